"""Text of the documentation site that is made while it is built; without mkdocs."""
