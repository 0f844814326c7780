"""Many runs compared: the grid, results, report page, figures."""
