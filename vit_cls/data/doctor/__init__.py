"""What is wrong with images, before hours are spent on them: issue types, scan, copies, report."""
