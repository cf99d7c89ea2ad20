"""Planning: what a recipe needs and costs on devices that are not here."""
