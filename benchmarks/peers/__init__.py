"""What the project is measured against: others' paths, written anew from what they do."""
