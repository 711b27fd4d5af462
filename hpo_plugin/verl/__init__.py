"""What registers HPO and A-HPO in verl. Nothing here is imported before verl asks for it."""
