"""Reading and writing of whole folders: outputs that appear at once or not at all."""
