"""Small programs around ddit_rt; those of demo_model make the model that ships with it."""
