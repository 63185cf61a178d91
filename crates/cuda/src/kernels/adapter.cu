// Adapters: output += B · m(A · x), for tokens of any adapters under any preferences in one launch.
//
// `tables[token]` is the token's adapter: an AdapterGroup for each group of each layer; `states[token]` is where its
// preference's state begins in `floats`. Tokens without an adapter stand before the first of these, and are not launched.

constexpr int ADAPTER_THREADS = 256;

// Of one part, at most: r1 and r2 of the adapter format.
constexpr int PART_RANK_MAX = 2048;

constexpr int MIXING_SCALE = 0;
constexpr int MIXING_AFFINE = 1;

// The adapter of one linear layer; the same in adapters.rs.
struct AdapterPart {
    const float* b; // (outputs, rank)
    int first_rank;
    int rank;
    int mixing;
    int state;
    int column; // of the group's output
    int outputs;
};

// Of linear layers that share their input.
struct AdapterGroup {
    const float* a; // (ranks, inputs)
    AdapterPart parts[3];
    int ranks;
    int part_count;
};

// features[token][rank] = A · x. Grid: (tokens, ranks / 8), a warp for each rank; `inputs` is a multiple of 16.
extern "C" __global__ void adapter_down(const AdapterGroup* const* tables, int group_index, const float* input, int inputs,
                                        float* features, int stride) {
    const int token = blockIdx.x, lane = threadIdx.x % WARP;
    const AdapterGroup& group = tables[token][group_index];
    const int rank = blockIdx.y * (ADAPTER_THREADS / WARP) + threadIdx.x / WARP;
    if (rank >= group.ranks) return;

    const float* x = input + size_t(token) * inputs;
    const float* a = group.a + size_t(rank) * inputs;
    float sum = 0.0f;
    for (int k = lane * 4; k < inputs; k += WARP * 4) {
        float weights[4], numbers[4];
        load(a + k, weights);
        load(x + k, numbers);
#pragma unroll
        for (int i = 0; i < 4; i++) sum = fmaf(numbers[i], weights[i], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) features[size_t(token) * stride + rank] = sum;
}

// s · m(z) at one rank: s · z, γ ⊙ z + β, or a row of M · z.
__device__ inline float modulate(const AdapterPart& part, const float* state, const float* z, int rank) {
    if (part.mixing == MIXING_SCALE) return state[0] * z[rank];
    if (part.mixing == MIXING_AFFINE) return state[rank] * z[rank] + state[part.rank + rank];
    float sum = 0.0f;
    for (int i = 0; i < part.rank; i++) sum = sum + state[rank * part.rank + i] * z[i];
    return sum;
}

// output[token][column] += B · m(features). Grid: (tokens, columns / 256, parts).
extern "C" __global__ void adapter_up(const AdapterGroup* const* tables, int group_index, const int* states,
                                      const float* floats, const float* features, int stride, float* output, int width) {
    __shared__ float mixed[PART_RANK_MAX];
    const int token = blockIdx.x, first = blockIdx.y * ADAPTER_THREADS;
    const AdapterGroup& group = tables[token][group_index];
    if (int(blockIdx.z) >= group.part_count) return;
    const AdapterPart& part = group.parts[blockIdx.z];
    if (first >= part.outputs) return;

    const float* state = floats + states[token] + part.state;
    const float* z = features + size_t(token) * stride + part.first_rank;
    for (int rank = threadIdx.x; rank < part.rank; rank += ADAPTER_THREADS) mixed[rank] = modulate(part, state, z, rank);
    __syncthreads();

    const int at = first + threadIdx.x;
    if (at >= part.outputs) return;
    float* target = output + size_t(token) * width + part.column + at;
    const float* b = part.b + size_t(at) * part.rank;
    float sum = *target;
    for (int rank = 0; rank < part.rank; rank++) sum = fmaf(b[rank], mixed[rank], sum);
    *target = sum;
}
