"""What people read: plots, summary tables, the report's pages, the explorer of the tour."""
