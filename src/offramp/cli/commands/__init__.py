"""The commands of the product, one file each."""
