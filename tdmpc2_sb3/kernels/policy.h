/* Draws of the policy prior, and its loss. */

#define LOG_STD_RANGE (LOG_STD_MAX - LOG_STD_MIN)
#define LOG_SQRT_2_PI 0.91893853f

/* Draws of the policy prior from its outputs, [rows, 2 A], and standard normal noise, [rows, A]:
 * rows of latents, [rows, Z], and actions into pairs; the actions' log-probabilities and scaled
 * entropies (scaled_entropy in losses.py, by one or the other of its names), [rows]. kept: for the
 * gradients, tanh(s), the deviations and the actions, [3, rows, A]. */
void policy_sample_forward(const float *moments, const float *noise, const float *latents,
                           float *pairs, float *log_prob, float *entropy, float *kept,
                           int64_t rows, int64_t latent_dim, int64_t action_dim,
                           int64_t squashed_entropy, int64_t threads) {
    int64_t all = rows * action_dim;
    FOR_EACH_SHARE {
        const float *mean = moments + 2 * i * action_dim, *s = mean + action_dim;
        float *pair = pairs + i * (latent_dim + action_dim);
        memcpy(pair, latents + i * latent_dim, sizeof(float) * (size_t)latent_dim);
        float gaussian = 0.0f, squashed = 0.0f;
        for (int64_t j = 0; j < action_dim; j++) {
            int64_t at = i * action_dim + j;
            float tanh_s = tanhf(s[j]);
            float log_std = LOG_STD_MIN + 0.5f * LOG_STD_RANGE * (tanh_s + 1.0f);
            float std = expf(log_std), action = tanhf(mean[j] + noise[at] * std);
            float room = 1.0f - action * action;
            gaussian -= 0.5f * noise[at] * noise[at] + log_std + LOG_SQRT_2_PI;
            squashed += logf((room < 0.0f ? 0.0f : room) + SQUASH_EPSILON);
            pair[latent_dim + j] = action;
            kept[at] = tanh_s;
            kept[all + at] = std;
            kept[2 * all + at] = action;
        }
        float p = gaussian - squashed;
        log_prob[i] = p;
        entropy[i] = squashed_entropy
                         ? -(p + (float)(action_dim - 1) * gaussian)
                         : -p * (gaussian * (float)action_dim / (p + ENTROPY_EPSILON));
    }
}

/* Gradients of policy_sample_forward by moments, from those by the actions, [rows, A], and by the
 * entropies, [rows]; log_prob and kept are what it wrote. */
void policy_sample_backward(const float *noise, const float *log_prob, const float *kept,
                            const float *grad_actions, const float *grad_entropy,
                            float *grad_moments, int64_t rows, int64_t action_dim,
                            int64_t squashed_entropy, int64_t threads) {
    int64_t all = rows * action_dim;
    FOR_EACH_SHARE {
        float *grad_mean = grad_moments + 2 * i * action_dim, *grad_s = grad_mean + action_dim;
        float p = log_prob[i], gaussian = 0.0f;
        for (int64_t j = i * action_dim; j < (i + 1) * action_dim; j++)
            gaussian -= 0.5f * noise[j] * noise[j] + LOG_SQRT_2_PI + LOG_STD_MIN +
                        0.5f * LOG_STD_RANGE * (kept[j] + 1.0f);
        /* by p = g - what squashing takes, and by g in all: of -(p + (A - 1) g) */
        float grad_p = -grad_entropy[i], grad_gaussian = -(float)action_dim * grad_entropy[i];
        if (!squashed_entropy) { /* of -A p g / (p + epsilon) */
            float scale = -(float)action_dim * grad_entropy[i] / (p + ENTROPY_EPSILON);
            grad_p = scale * gaussian * ENTROPY_EPSILON / (p + ENTROPY_EPSILON);
            grad_gaussian = scale * p + grad_p;
        }
        for (int64_t j = 0; j < action_dim; j++) {
            int64_t at = i * action_dim + j;
            float tanh_s = kept[at], std = kept[all + at], action = kept[2 * all + at];
            float room = 1.0f - action * action;
            float grad_action = grad_actions[at];
            if (room > 0.0f) grad_action += grad_p * 2.0f * action / (room + SQUASH_EPSILON);
            grad_mean[j] = grad_action * room;
            grad_s[j] = (grad_mean[j] * noise[at] * std - grad_gaussian) * 0.5f * LOG_STD_RANGE *
                      (1.0f - tanh_s * tanh_s);
        }
    }
}

/* Squashed draws of the policy prior, [count, A], from its outputs and standard normal noise. */
static void policy_rows(const float *moments, const float *noise, float *actions, int64_t count,
                        int64_t action_dim) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < action_dim; j++) {
            const float *row = moments + i * 2 * action_dim;
            float log_std =
                LOG_STD_MIN + 0.5f * LOG_STD_RANGE * (tanhf(row[action_dim + j]) + 1.0f);
            actions[i * action_dim + j] =
                tanhf(row[j] + noise[i * action_dim + j] * expf(log_std));
        }
}

static int compare_floats(const void *a, const void *b) { /* NaN behind all others */
    float x = *(const float *)a, y = *(const float *)b;
    return isnan(x) || isnan(y) ? isnan(x) - isnan(y) : (x > y) - (x < y);
}

/* Of numbers in order. */
static float percentile(const float *ordered, int64_t count, double share) {
    double position = share * (double)(count - 1);
    int64_t low = (int64_t)position, high = low + 1 < count ? low + 1 : low;
    return between(ordered[low], ordered[high], (float)(position - (double)low));
}

/* The policy prior's loss as in losses.py, from values of heads networks at rows states, [heads,
 * rows], of which the first ones, at the sub-sequences' starts, move the scale. out: loss, mean
 * entropy, mean scaled entropy, new scale. Gradients: by the values and by the scaled entropies.
 * ordered: scratch, [starts]. */
void policy_objective(const float *values, const float *log_prob, const float *entropy,
                      const float *weights, const float *scale, float tau, float entropy_coef,
                      float *grad_values, float *grad_entropy, float *out, float *ordered,
                      int64_t heads, int64_t rows, int64_t starts) {
    double loss = 0.0, log_probs = 0.0, entropies = 0.0;
    for (int64_t i = 0; i < rows; i++) {
        float mean = 0.0f;
        for (int64_t n = 0; n < heads; n++) mean += values[n * rows + i];
        grad_entropy[i] = mean / (float)heads;
        if (i < starts) ordered[i] = grad_entropy[i];
    }
    qsort(ordered, (size_t)starts, sizeof(float), compare_floats);
    float range = percentile(ordered, starts, SCALE_HIGH) -
                  percentile(ordered, starts, SCALE_LOW);
    out[3] = between(*scale, range < 1.0f ? 1.0f : range, tau);
    for (int64_t i = 0; i < rows; i++) {
        loss -= weights[i] * (entropy_coef * entropy[i] + grad_entropy[i] / out[3]);
        log_probs += log_prob[i];
        entropies += entropy[i];
        grad_entropy[i] = -entropy_coef * weights[i];
        for (int64_t n = 0; n < heads; n++)
            grad_values[n * rows + i] = -weights[i] / ((float)heads * out[3]);
    }
    out[0] = (float)loss;
    out[1] = (float)(-log_probs / (double)rows);
    out[2] = (float)(entropies / (double)rows);
}
