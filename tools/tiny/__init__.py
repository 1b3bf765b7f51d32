"""How the shipped tiny Step3 is made: data, training, evaluation."""
