"""`mla-benchmark`: options, the command's steps, the run, and measurements in processes of their own."""
