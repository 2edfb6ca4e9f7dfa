"""What the results show: statistics, tables, figures, and a look inside the networks."""
