"""Back ends behind one protocol: single, ddp, deepspeed. One file each."""
