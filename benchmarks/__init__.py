"""How fast the project is: each module prints a table and says whether its targets are met."""
