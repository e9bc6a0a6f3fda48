"""What ``sample`` is asked for, checked and encoded into what each image is given."""
