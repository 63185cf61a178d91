// Attention of one token's query head over its sequence in the paged cache, in one pass (online softmax).
//
// Positions are taken in tiles of 32, tile t by warp t mod 4, and the four warps are joined in their order: a function of
// the token's position, so that neither the cut into chunks, the other rows nor the blocks of the cache show. Within a
// tile each lane scores one position, which needs no exchange; then lanes are columns of the values.

constexpr int ATTENTION_WARPS = 4;
constexpr int HEAD_DIM_MAX = 256;

// Eight numbers of half precision in one load.
__device__ inline void load(const f16* from, float (&to)[8]) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    const unsigned pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = widen(f16{static_cast<unsigned short>(pairs[i] & 0xffffu)});
        to[2 * i + 1] = widen(f16{static_cast<unsigned short>(pairs[i] >> 16)});
    }
}

// Grid: (tokens, heads). `tables[token]` is where the token's block table begins in `blocks`; queries are scaled already
// and stand in rows of `stride` floats; output is (tokens, heads × head_dim). COLUMNS × 32 >= head_dim. `heads` and
// `kv_heads` are a rank's own; each of the latter is read by `group` query heads, of which it lacks the `skipped` first ones.
template <int COLUMNS, typename Kv>
__device__ inline void attention(const float* queries, int stride, const Kv* keys, const Kv* values,
                                 const int* positions, const int* tables, const int* blocks, float* output, int heads,
                                 int skipped, int group, int kv_heads, int head_dim, int block_tokens) {
    constexpr int RUN = 16 / sizeof(Kv);
    __shared__ float query[HEAD_DIM_MAX];
    __shared__ float weights[ATTENTION_WARPS][WARP];
    __shared__ int slots[ATTENTION_WARPS][WARP];
    __shared__ float maxima[ATTENTION_WARPS];
    __shared__ float sums[ATTENTION_WARPS];
    __shared__ float parts[ATTENTION_WARPS][HEAD_DIM_MAX];
    const int token = blockIdx.x, head = blockIdx.y;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int width = kv_heads * head_dim;
    const int column = (skipped + head) / group * head_dim;

    for (int i = threadIdx.x; i < head_dim; i += ATTENTION_WARPS * WARP) {
        query[i] = queries[size_t(token) * stride + head * head_dim + i];
    }
    __syncthreads();

    const int visible = positions[token] + 1;
    const int* table = blocks + tables[token];
    const float nothing = __uint_as_float(0xff800000u); // -∞
    float maximum = nothing, sum = 0.0f;
    float result[COLUMNS] = {};
    for (int first = warp * WARP; first < visible; first += ATTENTION_WARPS * WARP) {
        const int position = first + lane;
        float score = nothing;
        int slot = 0;
        if (position < visible) {
            slot = table[position / block_tokens] * block_tokens + position % block_tokens;
            const Kv* key = keys + size_t(slot) * width + column;
            score = 0.0f;
            for (int i = 0; i < head_dim; i += RUN) {
                float run[RUN];
                load(key + i, run);
#pragma unroll
                for (int j = 0; j < RUN; j++) score = fmaf(query[i + j], run[j], score);
            }
        }
        const float greatest = fmaxf(maximum, warp_max(score));
        const float kept = expf(maximum - greatest);
        const float weight = expf(score - greatest);
        sum = sum * kept + warp_sum(weight);
        maximum = greatest;

        weights[warp][lane] = weight;
        slots[warp][lane] = slot;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) result[i] *= kept;
        const int count = min(WARP, visible - first);
        for (int j = 0; j < count; j++) {
            const Kv* value = values + size_t(slots[warp][j]) * width + column;
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) {
                const int at = lane + i * WARP;
                if (at < head_dim) result[i] = fmaf(weights[warp][j], widen(value[at]), result[i]);
            }
        }
        __syncwarp();
    }

    if (lane == 0) {
        maxima[warp] = maximum;
        sums[warp] = sum;
    }
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
        if (lane + i * WARP < head_dim) parts[warp][lane + i * WARP] = result[i];
    }
    __syncthreads();

    // Warp 0 has a position at least, so that the greatest is a number; a warp without one weighs e^-∞ = 0.
    float greatest = maxima[0];
    for (int i = 1; i < ATTENTION_WARPS; i++) greatest = fmaxf(greatest, maxima[i]);
    float total = 0.0f;
    for (int i = 0; i < ATTENTION_WARPS; i++) total = fmaf(sums[i], expf(maxima[i] - greatest), total);
    for (int at = threadIdx.x; at < head_dim; at += ATTENTION_WARPS * WARP) {
        float x = 0.0f;
        for (int i = 0; i < ATTENTION_WARPS; i++) x = fmaf(parts[i][at], expf(maxima[i] - greatest), x);
        output[(size_t(token) * heads + head) * head_dim + at] = x / total;
    }
}

#define ATTENTION(NAME, COLUMNS, KV)                                                                                \
    extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * WARP)                                            \
        NAME(const float* queries, int stride, const KV* keys, const KV* values, const int* positions,              \
             const int* tables, const int* blocks, float* output, int heads, int skipped, int group, int kv_heads,  \
             int head_dim, int block_tokens) {                                                                      \
        attention<COLUMNS>(queries, stride, keys, values, positions, tables, blocks, output, heads, skipped, group, \
                           kv_heads, head_dim, block_tokens);                                                       \
    }

ATTENTION(attention_f32_32, 1, float)
ATTENTION(attention_f32_64, 2, float)
ATTENTION(attention_f32_128, 4, float)
ATTENTION(attention_f32_256, 8, float)
ATTENTION(attention_f16_32, 1, f16)
ATTENTION(attention_f16_64, 2, f16)
ATTENTION(attention_f16_128, 4, f16)
ATTENTION(attention_f16_256, 8, f16)
