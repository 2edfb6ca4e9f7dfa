"""What the results show: statistics, tables, figures, and what is inside the networks."""
