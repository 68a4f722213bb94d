"""Numbers that compare a picture with its original, apart for the preserved and the generated pixels."""
