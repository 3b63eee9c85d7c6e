"""What people read: figures in pages, plots, the README's picture, report pages."""
