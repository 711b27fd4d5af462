"""What is measured against verl's own code, on this machine; ``run()`` of each module gives its rows."""
