"""What launch/simulate-cluster is made of. Standard library only: it runs before dtrain is installed."""
