"""What lies below a `silo.Volume`: memory, files and block devices, and layers around them."""
