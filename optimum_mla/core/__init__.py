"""The foundation of the package: errors, shapes and sizes, lists of layers, progress. Nothing here imports torch."""
