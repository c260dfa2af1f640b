"""What people read: tables and summaries."""
