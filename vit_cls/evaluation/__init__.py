"""From a classifier and images to counts, and from counts to numbers with their doubt."""
