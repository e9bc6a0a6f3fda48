/* A model whose DDIM trajectory is known exactly. All data is one image c, so x = alpha c + sigma e for some noise e,
 * the perfect model answers e = (x - alpha c) / sigma, and every DDIM step (arXiv 2010.02502, eq. 12 with eta = 0) must
 * lead to alpha' c + sigma' e with the same e. */
#ifndef TSTITCH_DDIM_H
#define TSTITCH_DDIM_H

#include <math.h>
#include <tstitch/step.h>

enum { STEPS = 10 };

/* alpha = cos(u), sigma = sin(u); u falls from near pi/2 to 0. i = 0 ... STEPS. */
static inline double ddim_alpha(int i) { return cos(1.5 * (STEPS - i) / STEPS); }
static inline double ddim_sigma(int i) { return sin(1.5 * (STEPS - i) / STEPS); }

static inline double ddim_timestep(int i) { return 999.0 * (STEPS - i) / STEPS; }

/* The table [STEPS, TSTITCH_ROW_SIZE] of a lane. */
static inline void ddim_rows(float* rows, float guidance, float guided_channels) {
    for (int i = 0; i < STEPS; ++i) {
        const double a = ddim_alpha(i), b = ddim_sigma(i), a2 = ddim_alpha(i + 1), b2 = ddim_sigma(i + 1);
        float* row = rows + i * TSTITCH_ROW_SIZE;
        for (int k = 0; k < TSTITCH_ROW_SIZE; ++k) row[k] = 0;
        row[TSTITCH_ROW_T] = (float)ddim_timestep(i);
        row[TSTITCH_ROW_C_IN] = 1;
        row[TSTITCH_ROW_P] = (float)(1 / a); /* D = (x - sigma m) / alpha */
        row[TSTITCH_ROW_Q] = (float)(-b / a);
        row[TSTITCH_ROW_A] = (float)(b2 / b); /* x' = alpha' D + sigma' (x - alpha D) / sigma */
        row[TSTITCH_ROW_B] = (float)(a2 - b2 * a / b);
        row[TSTITCH_ROW_G] = guidance;
        row[TSTITCH_ROW_GUIDED_CHANNELS] = guided_channels;
    }
}

#endif
