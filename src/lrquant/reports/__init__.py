"""Reports: pictures, tables and summaries for people to read."""
