/* Planning by sampled action sequences, in one call that takes each sequence through all networks.
 *
 * E environments have N sequences each, of which the first P are the policy prior's and the
 * others, S of them, are drawn from a Gaussian that I iterations improve. Steps come before
 * environments, as in the planner. */

static inline int64_t networks_scratch(int64_t widest, int64_t memory) {
    return (2 * BLOCK_ROWS + 1) * widest + (BLOCK_ROWS + 1) * memory;
}

/* Numbers of scratch that a thread needs: two blocks of rows and what the dynamics keep, and the
 * same of a row for z_0; latents and last actions of a block. */
int64_t planning_scratch(const search *s) {
    return networks_scratch(s->widest, s->memory) +
           BLOCK_ROWS * (s->horizon * s->latent_dim + s->action_dim);
}

/* Numbers of a row of latents. */
static inline int64_t latent_row(const search *s) { return s->latent_dim - s->simplices; }

/* Row of an array [H, E, N, ...] where the block starts. */
static inline int64_t row_at(const search *s, int64_t step, block b) {
    return (step * s->envs + b.env) * s->samples + b.first;
}

/* The same of an array [H, D, count, ...], which has numbers of count sequences from from on. */
static inline int64_t noise_row_at(const search *s, int64_t step, block b, int64_t from,
                                   int64_t count) {
    return (step * s->noise_envs + (s->noise_envs > 1 ? b.env : 0)) * count + b.first - from;
}

/* Actions of Gaussian samples, within their bounds; NaN stays. */
static void draw_samples(const search *s, int64_t iteration, block b) {
    int64_t a_dim = s->action_dim, drawn = s->samples - s->prior;
    for (int64_t h = 0; h < s->horizon; h++) {
        int64_t at = ((iteration * s->horizon + h) * s->envs + b.env) * a_dim;
        int64_t from = noise_row_at(s, iteration * s->horizon + h, b, s->prior, drawn);
        const float *mean = s->means + at, *std = s->stds + at;
        const float *noise = s->sample_noise + from * a_dim;
        float *actions = s->actions + row_at(s, h, b) * a_dim;
        for (int64_t i = 0; i < b.count; i++)
            for (int64_t j = 0; j < a_dim; j++) {
                float a = mean[j] + std[j] * noise[i * a_dim + j];
                a = a < -1.0f ? -1.0f : a;
                actions[i * a_dim + j] = a > 1.0f ? 1.0f : a;
            }
    }
}

/* z_1..z_H into latents, BLOCK_ROWS Z numbers for each step, from z_0: under the policy's actions,
 * which are written, if the block is of its sequences, else under the actions as they are. */
static void roll_out(const search *s, block b, float *latents, float *own) {
    int64_t z_dim = latent_row(s), a_dim = s->action_dim;
    const dynamics *d = &s->dynamics;
    const float *z = s->start + b.env * z_dim;
    state_space_memory memory = {0};
    if (d->depth) memory = state_space_start(d, z, b.count, own + networks_scratch(s->widest, 0));
    for (int64_t h = 0; h < s->horizon; h++) {
        float *a = s->actions + row_at(s, h, b) * a_dim;
        float *next = latents + h * BLOCK_ROWS * s->latent_dim;
        if (b.first < s->prior) {
            const float *noise = s->policy_noise + noise_row_at(s, h, b, 0, s->prior) * a_dim;
            const float *moments =
                network_rows(s->policy, z, z_dim, 0, 0, h ? b.count : 1, 0, own, s->widest);
            for (int64_t i = 0; i < b.count; i++) /* z_0 is the same for all */
                policy_rows(moments + (h ? i : 0) * 2 * a_dim, noise + i * a_dim, a + i * a_dim,
                            1, a_dim);
        }
        if (d->depth) state_space_step(d, &memory, a, b.count, next);
        else network_rows(d->net, z, z_dim, h == 0, a, b.count, next, own, s->widest);
        if (s->simplices)
            reduce_rows(next, s->latent_dim, next, z_dim, s->simplices, 0, 0, b.count);
        z = next;
    }
}

/* Discounted sums of the rewards on the way, and the discount of what follows. With a termination
 * network nothing counts after its logit exceeds 0. */
static void sum_rewards(const search *s, block b, const float *latents, float *own) {
    int64_t z_dim = latent_row(s), a_dim = s->action_dim;
    int64_t cols = s->reward.layers[s->reward.count - 1].cols;
    const float *z = s->start + b.env * z_dim;
    float *total = s->rewards + row_at(s, 0, b), *alive = s->discounts + row_at(s, 0, b);
    double discount = 1.0;
    for (int64_t i = 0; i < b.count; i++) {
        total[i] = 0.0f;
        alive[i] = 1.0f;
    }
    for (int64_t h = 0; h < s->horizon; h++) {
        const float *logits =
            network_rows(s->reward, z, z_dim, h == 0, s->actions + row_at(s, h, b) * a_dim,
                         b.count, 0, own, s->widest);
        for (int64_t i = 0; i < b.count; i++)
            total[i] += (float)discount * alive[i] *
                        two_hot_inverse_row(logits + i * cols, s->bins, cols);
        z = latents + h * BLOCK_ROWS * s->latent_dim;
        discount *= s->gamma;
        if (s->termination.count) {
            logits = network_rows(s->termination, z, z_dim, 0, 0, b.count, 0, own, s->widest);
            for (int64_t i = 0; i < b.count; i++)
                if (logits[i] > TERMINATION_LOGIT) alive[i] = 0.0f;
        }
    }
    for (int64_t i = 0; i < b.count; i++) alive[i] *= (float)discount;
}

/* What sequences are worth: their rewards, and discounted the mean of two networks of q at z_H, of
 * which z has the rows, and the policy's action there. a: scratch, [BLOCK_ROWS, A]. */
static void sum_values(const search *s, int64_t iteration, block b, const float *z, float *a,
                       float *own) {
    int64_t z_dim = latent_row(s), a_dim = s->action_dim, row = row_at(s, 0, b);
    const float *noise =
        s->terminal_noise + noise_row_at(s, iteration, b, 0, s->samples) * a_dim;
    float *values = s->values + row;
    policy_rows(network_rows(s->policy, z, z_dim, 0, 0, b.count, 0, own, s->widest), noise, a,
                b.count, a_dim);
    for (int64_t n = 0; n < 2; n++) {
        network net = {s->q.layers + s->heads[2 * iteration + n] * s->q.count, s->q.count};
        int64_t cols = net.layers[net.count - 1].cols;
        const float *logits = network_rows(net, z, z_dim, 0, a, b.count, 0, own, s->widest);
        for (int64_t i = 0; i < b.count; i++) {
            float value = 0.5f * two_hot_inverse_row(logits + i * cols, s->bins, cols);
            values[i] = n ? values[i] + value : value;
        }
    }
    for (int64_t i = 0; i < b.count; i++)
        values[i] = s->rewards[row + i] + s->discounts[row + i] * values[i];
}

/* Values of a block's sequences. Those of the policy are the same in every iteration: of them only
 * what follows z_H is drawn anew. */
static void evaluate(const search *s, int64_t iteration, block b, float *own) {
    int64_t z_dim = latent_row(s);
    float *latents = own + networks_scratch(s->widest, s->memory);
    float *last = latents + (s->horizon - 1) * BLOCK_ROWS * s->latent_dim;
    float *last_actions = latents + s->horizon * BLOCK_ROWS * s->latent_dim;
    block prior = b, drawn = b;
    prior.count = s->prior - b.first;
    prior.count = prior.count < 0 ? 0 : prior.count > b.count ? b.count : prior.count;
    drawn.first += prior.count;
    drawn.count -= prior.count;
    if (prior.count) {
        float *kept = s->prior_latents + (b.env * s->prior + b.first) * z_dim;
        size_t size = sizeof(float) * (size_t)(prior.count * z_dim);
        if (iteration == 0) {
            roll_out(s, prior, latents, own);
            sum_rewards(s, prior, latents, own);
            memcpy(kept, last, size);
        } else {
            memcpy(last, kept, size);
        }
    }
    if (drawn.count) {
        latents += prior.count * z_dim;
        draw_samples(s, iteration, drawn);
        roll_out(s, drawn, latents, own);
        sum_rewards(s, drawn, latents, own);
    }
    sum_values(s, iteration, b, last, last_actions, own);
}

/* Where the thread begins among all sequences, so that all have the same work: a sequence's steps,
 * for one of the policy only in the first iteration and then with the policy itself, and its
 * value. */
static int64_t first_of_thread(const search *s, int64_t iteration, int64_t thread,
                               int64_t threads) {
    int64_t prior = s->value_work + (iteration ? 0 : s->prior_work);
    int64_t drawn = s->value_work + s->steps_work;
    int64_t of_prior = s->prior * prior, of_env = of_prior + (s->samples - s->prior) * drawn;
    int64_t at = s->envs * of_env * thread / threads, rest = at % of_env;
    return at / of_env * s->samples +
           (rest < of_prior ? rest / prior : s->prior + (rest - of_prior) / drawn);
}

/* The block at that position among all sequences, up to end. */
static block block_at(const search *s, int64_t position, int64_t end) {
    int64_t env = position / s->samples, left = (env + 1) * s->samples;
    left = (left < end ? left : end) - position;
    return (block){env, position - env * s->samples, block_rows(left)};
}

/* The elites of an environment by their values, the highest first and among equals the first.
 * NaN counts as 0, and infinities as the largest numbers. */
static void choose_elites(const search *s, int64_t env) {
    const float *values = s->values + env * s->samples;
    float *best = s->elite_values + env * s->elites;
    int64_t *positions = s->positions + env * s->elites, count = 0;
    for (int64_t n = 0; n < s->samples; n++) {
        float value = isnan(values[n]) ? 0.0f : values[n];
        value = value > FLT_MAX ? FLT_MAX : value < -FLT_MAX ? -FLT_MAX : value;
        if (count == s->elites && !(value > best[count - 1])) continue;
        int64_t at = 0;
        for (int64_t end = count; at < end;) { /* behind those that are not less */
            int64_t middle = (at + end) / 2;
            if (best[middle] >= value) at = middle + 1;
            else end = middle;
        }
        if (count < s->elites) count++;
        memmove(best + at + 1, best + at, sizeof(float) * (size_t)(count - 1 - at));
        memmove(positions + at + 1, positions + at, sizeof(int64_t) * (size_t)(count - 1 - at));
        best[at] = value;
        positions[at] = n;
    }
}

/* The next Gaussian of an environment: mean and deviation of its elites, weighted by their values.
 */
static void refit(const search *s, int64_t iteration, int64_t env) {
    int64_t a_dim = s->action_dim, elites = s->elites;
    const float *value = s->elite_values + env * elites;
    const int64_t *positions = s->positions + env * elites;
    float *weight = s->weights + env * elites, sum = 0.0f;
    for (int64_t k = 0; k < elites; k++) {
        weight[k] = expf(s->temperature * (value[k] - value[0]));
        sum += weight[k];
    }
    for (int64_t k = 0; k < elites; k++) weight[k] /= sum;
    for (int64_t h = 0; h < s->horizon; h++) {
        int64_t at = (((iteration + 1) * s->horizon + h) * s->envs + env) * a_dim;
        float *m = s->means + at, *d = s->stds + at;
        const float *actions = s->actions + row_at(s, h, (block){env, 0, 0}) * a_dim;
        for (int64_t j = 0; j < a_dim; j++) m[j] = d[j] = 0.0f;
        for (int64_t k = 0; k < elites; k++)
            for (int64_t j = 0; j < a_dim; j++)
                m[j] += weight[k] * actions[positions[k] * a_dim + j];
        for (int64_t k = 0; k < elites; k++)
            for (int64_t j = 0; j < a_dim; j++) {
                float distance = actions[positions[k] * a_dim + j] - m[j];
                d[j] += weight[k] * distance * distance;
            }
        for (int64_t j = 0; j < a_dim; j++) {
            float deviation = sqrtf(d[j]);
            deviation = deviation < s->min_std ? s->min_std : deviation;
            d[j] = deviation > s->max_std ? s->max_std : deviation;
        }
        for (int64_t k = 0; h == 0 && k < elites; k++)
            memcpy(s->first_actions + (env * elites + k) * a_dim, actions + positions[k] * a_dim,
                   sizeof(float) * (size_t)a_dim);
    }
}

/* All iterations. Whoever values the last sequence of an environment refits it, so that the threads
 * wait for each other once in each: on a busy machine every wait costs a slice of the scheduler. */
void plan_search(const search *s, int64_t threads) {
    int64_t size = planning_scratch(s);
    memset(s->valued, 0, sizeof(int64_t) * (size_t)s->envs);
    for (int64_t i = 0; i < s->horizon * s->envs * s->action_dim; i++) s->stds[i] = s->max_std;
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < s->iterations; i++) {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < threads; t++) {
            int64_t at = first_of_thread(s, i, t, threads);
            int64_t end = first_of_thread(s, i, t + 1, threads);
            while (at < end) {
                block b = block_at(s, at, end);
                evaluate(s, i, b, s->scratch + t * size);
                if (__atomic_add_fetch(s->valued + b.env, b.count, __ATOMIC_ACQ_REL) ==
                    (i + 1) * s->samples) {
                    choose_elites(s, b.env);
                    refit(s, i, b.env);
                }
                at += b.count;
            }
        }
    }
}

/* What planner.py's plan makes of a search's elites: an action of one that is chosen by its weight,
 * which with exploration (null for none) is moved by the first deviation, and statistics. */
void choose_action(const float *elite_values, const float *weights, const float *first_actions,
                   const float *previous_mean, const float *mean, const float *std,
                   const float *gumbel, const float *exploration, float *action,
                   float *mean_by_env, float *std_by_env, float *value, float *elite_std,
                   float *effective_samples, float *mean_change, int64_t envs, int64_t elites,
                   int64_t horizon, int64_t a_dim) {
    for (int64_t e = 0; e < envs; e++) {
        const float *w = weights + e * elites, *v = elite_values + e * elites;
        int64_t chosen = 0;
        float best = 0.0f;
        double weighted = 0.0, sum = 0.0, squares = 0.0, distances = 0.0, changes = 0.0;
        for (int64_t k = 0; k < elites; k++) {
            float score = logf(w[k]) + gumbel[e * elites + k];
            if (k == 0 || score > best || (isnan(score) && !isnan(best))) { /* torch's argmax */
                best = score;
                chosen = k;
            }
            weighted += w[k] * v[k];
            squares += w[k] * w[k];
            sum += v[k];
        }
        for (int64_t k = 0; k < elites; k++) {
            double distance = v[k] - sum / (double)elites;
            distances += distance * distance;
        }
        for (int64_t h = 0; h < horizon; h++)
            for (int64_t j = 0; j < a_dim; j++) {
                int64_t from = (h * envs + e) * a_dim + j, to = (e * horizon + h) * a_dim + j;
                float change = mean[from] - previous_mean[from];
                changes += change * change;
                mean_by_env[to] = mean[from];
                std_by_env[to] = std[from];
            }
        for (int64_t j = 0; j < a_dim; j++) {
            float a = first_actions[(e * elites + chosen) * a_dim + j];
            if (exploration) a += std[e * a_dim + j] * exploration[e * a_dim + j];
            a = a < -1.0f ? -1.0f : a;
            action[e * a_dim + j] = a > 1.0f ? 1.0f : a; /* NaN stays */
        }
        value[e] = (float)weighted;
        elite_std[e] = (float)sqrt(distances / (double)elites);
        effective_samples[e] = (float)(1.0 / squares);
        mean_change[e] = (float)(changes / (double)(horizon * a_dim));
    }
}
