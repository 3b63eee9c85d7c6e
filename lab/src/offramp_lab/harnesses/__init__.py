"""offramp inside the tools that people use: classes that they find by entry points."""
