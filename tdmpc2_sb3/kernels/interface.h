/* All that Python and C share: constants, structures and functions.
 *
 * Python reads this file (interface.py) and understands no more of C than what is used here. It
 * takes an array whose name with _row behind it is another parameter, as x and x_row are, to be
 * one whose rows lie that many numbers apart; others are contiguous. What functions do is told
 * where they are. */
#pragma once

#include <stdint.h>

enum { ACTIVATION_NONE = 0, ACTIVATION_MISH = 1, ACTIVATION_SIMNORM = 2 };

#define SIMPLEX 8 /* numbers of the simplices that products know, see layers.h */

/* The step size of the state space, in agent steps. */
#define DT_MIN 1e-3f
#define DT_MAX 5.0f

/* The policy prior: the logarithm of its deviation, and what keeps logarithms and quotients
 * finite. */
#define LOG_STD_MIN (-10.0f)
#define LOG_STD_MAX 2.0f
#define SQUASH_EPSILON 1e-6f
#define ENTROPY_EPSILON 1e-8f

/* Percentiles of the values, between which the scale of the policy prior's loss lies. */
#define SCALE_LOW 0.05
#define SCALE_HIGH 0.95

#define TERMINATION_LOGIT 0.0f /* above it an episode counts as over: a probability of 1/2 */

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

/* A layer of the state-space dynamics (tdmpc2_sb3/model/dynamics/ssm.py tells what they do). */
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

/* What a search reads and where it writes. D environments have noise of their own: E, or 1 where
 * all share it. */
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

/* norms.h */
void norm_forward(const float *x, const float *gain, const float *shift, float *y,
                  float *statistics, int64_t rows, int64_t cols, float eps, int64_t activation,
                  int64_t simplex, int64_t threads);
void norm_backward(const float *grad, const float *x, const float *y, const float *gain,
                   const float *shift, const float *statistics, float *grad_x,
                   float *grad_parameters, float *sums, int64_t rows, int64_t cols,
                   int64_t activation, int64_t simplex, int64_t threads);

/* products.h */
int64_t panel_width(void);

/* layers.h */
void lay_out(const layer *layers, int64_t count, int64_t threads);
void lay_out_back(const layer *layers, int64_t count, int64_t networks, int64_t input_from,
                  int64_t threads);

/* networks.h */
int64_t workspace_size(const layer *layers, int64_t count, int64_t keep, int64_t rows);
void networks_forward(const layer *layers, int64_t count, int64_t networks, const float *x,
                      int64_t x_row, const int64_t *dropped, int64_t count_dropped, float share,
                      float *const *workspaces, int64_t keep, float *result, int64_t rows,
                      int64_t threads);
void rollout_forward(const layer *layers, int64_t count, const float *start, const float *actions,
                     float *inputs, float *workspace, int64_t keep, float *latents, int64_t steps,
                     int64_t rows, int64_t threads);

/* network_gradients.h */
int64_t scratch_size(const layer *layers, int64_t count, int64_t rows, int64_t threads);
void networks_backward(const layer *layers, int64_t count, int64_t networks, const float *x,
                       int64_t x_row, const int64_t *dropped, int64_t count_dropped, float share,
                       float *const *workspaces, float *result, const float *grad,
                       float *grad_input, int64_t input_from, int64_t input_cols, int64_t adds,
                       float *const *grad_parameters, float *const *scratches, int64_t rows,
                       int64_t threads);
void rollout_backward(const layer *layers, int64_t count, const float *inputs, float *workspace,
                      float *latents, float *grad_latents, float *const *grad_parameters,
                      float *scratch, int64_t steps, int64_t rows, int64_t threads);

/* losses.h */
void two_hot_inverse_forward(const float *logits, const float *bins, float *out, int64_t rows,
                             int64_t cols, int64_t threads);
void two_hot_inverse_backward(const float *grad, const float *logits, const float *bins,
                              float *grad_logits, int64_t rows, int64_t cols, int64_t threads);
void two_hot_cross_entropy_forward(const float *logits, const float *position, float *out,
                                   float *log_sum, int64_t rows, int64_t target_rows,
                                   int64_t cols, int64_t threads);
void two_hot_cross_entropy_backward(const float *grad, const float *logits,
                                    const float *position, const float *log_sum,
                                    float *grad_logits, int64_t rows, int64_t target_rows,
                                    int64_t cols, int64_t threads);
void two_hot_loss(const float *logits, const float *scalars, const float *weights,
                  const float *bins, float *loss, float *grad_logits, int64_t rows,
                  int64_t target_rows, int64_t cols, float scale, int64_t threads);
void squared_loss(const float *x, const float *target, const float *weights, float *loss,
                  float *grad, int64_t rows, int64_t cols, float scale, int64_t threads);
void termination_loss(const float *logits, const float *terminations, const float *valid,
                      float *loss, float *grad_logits, int64_t count, int64_t targets,
                      float scale);
void lambda_returns(const float *values, const float *rewards, const float *terminations,
                    float gamma, float lambda, float *targets, int64_t steps, int64_t rows);

/* elementwise.h */
void clear_array(float *x, int64_t count);
void copy_rows(const float *from, int64_t from_row, float *to, int64_t to_row, int64_t rows,
               int64_t cols, int64_t threads);
void add_rows(const float *a, const float *b, float *y, int64_t rows, int64_t b_rows,
              int64_t cols, int64_t threads);
void exponential(const float *x, const float *factors, float added, float *y, int64_t count);
void least_values(const float *values, float *out, int64_t heads, int64_t count);

/* arrays.h */
void total_norm(float *const *arrays, const int64_t *sizes, float *norm, int64_t count,
                int64_t threads);
void lerp_arrays(float *const *arrays, float *const *targets, const int64_t *sizes, float weight,
                 int64_t count, int64_t threads);
void adam_step(float *const *parameters, float *const *gradients, float *const *means,
               float *const *squares, float *const *steps, const int64_t *sizes,
               const float *rates, double beta1, double beta2, float eps, int64_t count,
               int64_t threads);

/* state_space.h */
void gelu_sum_forward(const float *a, const float *b, float *y, int64_t rows, int64_t cols,
                      int64_t b_row, int64_t threads);
void gelu_sum_backward(const float *grad, const float *a, const float *b, float *grad_x,
                       int64_t rows, int64_t cols, int64_t b_row, int64_t threads);
void selective_scan_forward(const float *selection, const float *drive, const float *start,
                            const float *alpha, const float *omega, const float *beta,
                            float *states, int64_t steps, int64_t rows, int64_t modes,
                            int64_t drive_row, int64_t threads);
void selective_scan_backward(const float *grad, const float *selection, const float *drive,
                             const float *start, const float *alpha, const float *omega,
                             const float *beta, const float *states, float *grad_selection,
                             float *grad_drive, float *grad_start, float *grad_parameters,
                             float *carry, float *sums, int64_t steps, int64_t rows,
                             int64_t modes, int64_t drive_row, int64_t threads);

/* policy.h */
void policy_sample_forward(const float *moments, const float *noise, const float *latents,
                           float *pairs, float *log_prob, float *entropy, float *kept,
                           int64_t rows, int64_t latent_dim, int64_t action_dim,
                           int64_t squashed_entropy, int64_t threads);
void policy_sample_backward(const float *noise, const float *log_prob, const float *kept,
                            const float *grad_actions, const float *grad_entropy,
                            float *grad_moments, int64_t rows, int64_t action_dim,
                            int64_t squashed_entropy, int64_t threads);
void policy_objective(const float *values, const float *log_prob, const float *entropy,
                      const float *weights, const float *scale, float tau, float entropy_coef,
                      float *grad_values, float *grad_entropy, float *out, float *ordered,
                      int64_t heads, int64_t rows, int64_t starts);

/* search.h */
int64_t planning_scratch(const search *s);
void plan_search(const search *s, int64_t threads);
void choose_action(const float *elite_values, const float *weights, const float *first_actions,
                   const float *previous_mean, const float *mean, const float *std,
                   const float *gumbel, const float *exploration, float *action,
                   float *mean_by_env, float *std_by_env, float *value, float *elite_std,
                   float *effective_samples, float *mean_change, int64_t envs, int64_t elites,
                   int64_t horizon, int64_t a_dim);
