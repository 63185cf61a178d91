// What happens to a row between the products: embedding, normalisation, rotation, the way into the cache, gating.
// Blocks of 256 threads; the first dimension of the grid is the token.

constexpr int ROW_THREADS = 256;

// output[token] = table[ids[token]]
template <typename Weight>
__device__ inline void embed(const Weight* table, const int* ids, float* output, int hidden) {
    const Weight* source = table + size_t(ids[blockIdx.x]) * hidden;
    for (int k = threadIdx.x; k < hidden; k += ROW_THREADS) {
        output[size_t(blockIdx.x) * hidden + k] = widen(source[k]);
    }
}

extern "C" __global__ void embed_f32(const float* table, const int* ids, float* output, int hidden) {
    embed(table, ids, output, hidden);
}

extern "C" __global__ void embed_bf16(const bf16* table, const int* ids, float* output, int hidden) {
    embed(table, ids, output, hidden);
}

// output[i] = weight · x / sqrt(mean(x²) + epsilon) with x = input[rows[i]], or input[i] without `rows`.
extern "C" __global__ void rms_norm(const float* input, const int* rows, const float* weight, float* output, int hidden,
                                    float epsilon) {
    __shared__ float partial[ROW_THREADS / WARP];
    const int row = rows ? rows[blockIdx.x] : int(blockIdx.x);
    const float* x = input + size_t(row) * hidden;

    float squares = 0.0f;
    for (int k = threadIdx.x; k < hidden; k += ROW_THREADS) squares = fmaf(x[k], x[k], squares);
    squares = warp_sum(squares);
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = squares;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < ROW_THREADS / WARP; i++) sum += partial[i];

    const float scale = 1.0f / sqrtf(sum / float(hidden) + epsilon);
    for (int k = threadIdx.x; k < hidden; k += ROW_THREADS) {
        output[size_t(blockIdx.x) * hidden + k] = x[k] * scale * weight[k];
    }
}

__device__ inline void store(float number, float& place) { place = number; }

// Rounds; beyond the greatest of half precision it is that one, and what is no number stays none.
__device__ inline void store(float number, f16& place) {
    place = nearest_f16(number > F16_MAX ? F16_MAX : number < -F16_MAX ? -F16_MAX : number);
}

// Adds the bias, where there is one, to a token's queries, keys and values, (heads + 2 × kv_heads) × head_dim; rotates
// queries and keys by the angles of its position; scales queries in place, and writes keys and values into the
// token's slot of this layer's cache: (slots, kv_heads × head_dim) each.
template <typename Kv>
__device__ inline void rotate_and_append(float* qkv, const float* bias, const int* positions, const int* slots,
                                         const float* cosine, const float* sine, Kv* keys, Kv* values, int heads,
                                         int kv_heads, int head_dim, float scale) {
    const int half = head_dim / 2;
    const int queries = heads * head_dim, width = kv_heads * head_dim;
    float* row = qkv + size_t(blockIdx.x) * (queries + 2 * width);
    const size_t angles = size_t(positions[blockIdx.x]) * half;
    const size_t slot = size_t(slots[blockIdx.x]) * width;

    for (int pair = threadIdx.x; pair < (heads + kv_heads) * half; pair += ROW_THREADS) {
        const int head = pair / half, i = pair % half;
        const int low = head * head_dim + i, high = low + half;
        const float a = bias ? row[low] + bias[low] : row[low];
        const float b = bias ? row[high] + bias[high] : row[high];
        const float x = a * cosine[angles + i] - b * sine[angles + i];
        const float y = b * cosine[angles + i] + a * sine[angles + i];
        if (head < heads) {
            row[low] = x * scale;
            row[high] = y * scale;
        } else {
            store(x, keys[slot + low - queries]);
            store(y, keys[slot + high - queries]);
        }
    }
    const int first = queries + width;
    for (int i = threadIdx.x; i < width; i += ROW_THREADS) {
        store(bias ? row[first + i] + bias[first + i] : row[first + i], values[slot + i]);
    }
}

#define ROTATE_AND_APPEND(NAME, KV)                                                                                   \
    extern "C" __global__ void NAME(float* qkv, const float* bias, const int* positions, const int* slots,            \
                                    const float* cosine, const float* sine, KV* keys, KV* values, int heads,          \
                                    int kv_heads, int head_dim, float scale) {                                        \
        rotate_and_append(qkv, bias, positions, slots, cosine, sine, keys, values, heads, kv_heads, head_dim, scale); \
    }

ROTATE_AND_APPEND(rotate_and_append_f32, float)
ROTATE_AND_APPEND(rotate_and_append_f16, f16)

// gated = silu(gate) · up of (gate, up), with silu(x) = x / (1 + e^-x). The second dimension of the grid cuts the row.
extern "C" __global__ void gate(const float* gate_up, float* gated, int intermediate) {
    const int i = blockIdx.y * ROW_THREADS + threadIdx.x;
    if (i >= intermediate) return;
    const float* row = gate_up + size_t(blockIdx.x) * 2 * intermediate;
    gated[size_t(blockIdx.x) * intermediate + i] = row[i] / (1.0f + expf(-row[i])) * row[intermediate + i];
}
