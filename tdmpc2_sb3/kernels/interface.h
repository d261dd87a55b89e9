/* What Python knows of the kernels: constants, structures and functions. */
#pragma once

#include <stdint.h>

enum { ACTIVATION_NONE = 0, ACTIVATION_MISH = 1, ACTIVATION_SIMNORM = 2 };

#define SIMPLEX 8

#define DT_MIN 1e-3f
#define DT_MAX 5.0f

#define LOG_STD_MIN (-10.0f)
#define LOG_STD_RANGE 12.0f /* up to 2 */
#define SQUASH_EPSILON 1e-6f
#define ENTROPY_EPSILON 1e-8f

/* A layer of a network: product with its weight and bias, then norm_forward if it has a gain. */
typedef struct {
    const float *weight;       /* [cols, depth], rows weight_row apart */
    float *packed;             /* transposed in panels, of lay_out */
    float *packed_back;        /* as it is in panels, of lay_out_back */
    const float *bias;         /* [cols] or null */
    const float *gain, *shift; /* [cols], or null without a norm */
    int64_t weight_row, depth, cols, activation, simplex;
    int64_t simplices; /* that the input is known to begin with, see layers.h */
    float eps;
} layer;

typedef struct {
    const layer *layers;
    int64_t count;
} network;

/* A layer of the state-space dynamics (tdmpc2_sb3/model/dynamics/ssm.py tells what they compute). */
typedef struct {
    const float *gain, *shift;          /* of the LayerNorm in front, [width] */
    layer products;                     /* B, V and W_1 side by side */
    layer selection;                    /* W_2; of no columns if time-invariant */
    layer readout, mix;                 /* C, W */
    const float *alpha, *omega, *beta;  /* [modes] */
    int64_t modes;
    float eps; /* of the LayerNorm */
} state_space_layer;

/* Dynamics: a network, or a state space. */
typedef struct {
    network net; /* of no layers if it is a state space */
    layer features, context, starts, action, out; /* W_c, W_u, P, W_a, W_o */
    const state_space_layer *stack;
    int64_t depth;
} dynamics;

/* What a search reads and where it writes. D environments have noise of their own: E, or 1 where all
 * share it. */
typedef struct {
    int64_t iterations, horizon, envs, samples, prior, elites, noise_envs, latent_dim, action_dim;
    int64_t simplices; /* of a latent, if all rows of latents are reduced; else 0 */
    int64_t widest; /* numbers of a row of the scratch: of the widest layer */
    int64_t memory; /* numbers that the dynamics keep a row; 0 for a network */
    int64_t steps_work, prior_work, value_work; /* multiply-adds of a row, see first_of_thread */
    dynamics dynamics;
    network reward, policy;
    network termination; /* of no layers if episodes do not end */
    network q;           /* all of them, one after the other; count is that of one */
    const float *bins, *start; /* start: z_0, [E, Z] or reduced */
    const float *policy_noise;   /* standard normal, as are the next two, [H, D, P, A] */
    const float *sample_noise;   /* [I, H, D, S, A] */
    const float *terminal_noise; /* of the policy's actions at z_H, [I, D, N, A] */
    const int64_t *heads;        /* of Q, whose mean counts, [I, 2] */
    float *actions;              /* [H, E, N, A] */
    float *prior_latents;        /* z_H of the policy's sequences, [E, P, Z] or reduced */
    float *rewards, *discounts;  /* on the way, and of what follows, [E, N] */
    float *values;               /* [E, N] */
    float *means, *stds; /* of the Gaussians, the first mean given, [I + 1, H, E, A] */
    float *elite_values;         /* the highest first, [E, K] */
    float *weights;              /* [E, K] */
    float *first_actions;        /* [E, K, A] */
    int64_t *positions;          /* of the elites among the sequences, [E, K] */
    int64_t *valued;             /* sequences in all iterations so far, [E] */
    float *scratch;              /* [threads, planning_scratch] */
    double gamma;
    float temperature, min_std, max_std;
} search;
