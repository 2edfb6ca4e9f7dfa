"""Many runs: a notebook executed over a sweep file, on this machine or a cluster, and their results as one table."""
