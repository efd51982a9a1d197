"""Back ends behind one protocol: single, ddp, deepspeed, fsdp. One file each."""
