#include "vectors.h"

/* How many values a vector has, as compiled for this machine. Called by autoencoder/compiled.py. */
int vector_lanes(void) { return LANES; }
