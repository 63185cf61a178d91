// Products with weights of bf16 on tensor cores: a block computes 16 outputs of 8 rows, or 2 or 4 times as many of both.
//
// Activations stay f32: each is cut into three terms of bf16, which together are the activation, and the weights are
// multiplied with all three. Products of two bf16 are exact in the sums, which are f32.
//
// Sums have one order. Inputs are taken in parts of 32, part p by warp p mod 8 of the block. The sum of a part begins
// with nothing, takes the smallest terms first, and is then added to the warp's; in the end the sums of the eight warps
// are added in their order. Where an f32 would be rounded, tensor cores cut off, always towards zero: so no sum that goes
// through them is longer than a part. All of that follows from the number of inputs, and a column of a product knows
// nothing of the others: how many rows there are, where a row stands among them, and which instance computes it do not
// show.
//
// Decoding is bound by reading the weights. Its floor is 2 · inputs · outputs bytes / bandwidth: 10 µs for 4096 × 4096 at
// the 3.35 TB/s of an H100. To get there, bandwidth × latency bytes have to be on their way (Little's law): at 0.7 µs
// 18 KB for each of its 132 SMs, and 25 KB at the 4.8 TB/s of an H200. A block of any instance has 128 bytes on their way to
// each lane, 32 KB: one to an SM is enough. Activations come from the L2 cache, as often as there are blocks of outputs:
// instances for more rows take more outputs, too.

constexpr int TENSOR_WARPS = 8;

// What a product of tensor cores makes.
constexpr int TILE_OUTPUTS = 16;
constexpr int TILE_ROWS = 8;

// Of a part: two products of 16, of which a lane has 8 of each of its outputs and rows, side by side: 16 bytes of
// weights. Which input stands where in a product is free, as long as weights and activations agree.
constexpr int PART_INPUTS = 32;
constexpr int LANE_INPUTS = 8;

// Parts whose weights are on their way, of a single tile.
constexpr int PARTS_AHEAD = 4;

// Of an activation, the largest first.
constexpr int TERMS = 3;

// Floats beside the sums of a row, so that lanes write them to banks of their own.
constexpr int BESIDE = 4;

struct Operands {
    const bf16* weight;
    const float* input;
    float* output;
    int rows;
    int inputs;
    int outputs;
    int add;
};

// A lane's weights of a part: of outputs g and g + 8 of each tile, where g is the lane's group.
template <int TILES>
struct PartWeights {
    uint4 outputs[TILES][2];
};

// A lane's activations of a part: of row g of each tile.
template <int TILES>
struct PartRows {
    float rows[TILES][LANE_INPUTS / 4][4];
};

// As multiply_add has them: which output and row are a lane's, and which inputs.
__device__ inline int lane_group() { return threadIdx.x % WARP / 4; }

__device__ inline int lane_member() { return threadIdx.x % 4; }

// Zeros beyond the last output and input.
template <int TILES>
__device__ inline PartWeights<TILES> load_weights(const Operands& of, int part) {
    const int k = part * PART_INPUTS + lane_member() * LANE_INPUTS;
    PartWeights<TILES> weights;
#pragma unroll
    for (int i = 0; i < TILES * 2; i++) {
        const int at = blockIdx.y * TILES * TILE_OUTPUTS + i * 8 + lane_group();
        const uint4* from = reinterpret_cast<const uint4*>(of.weight + size_t(at) * of.inputs + k);
        weights.outputs[i / 2][i % 2] = at < of.outputs && k < of.inputs ? *from : uint4{};
    }
    return weights;
}

// Zeros beyond the last row and input.
template <int TILES>
__device__ inline PartRows<TILES> load_rows(const Operands& of, int part) {
    const int k = part * PART_INPUTS + lane_member() * LANE_INPUTS;
    PartRows<TILES> numbers = {};
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const int at = blockIdx.x * TILES * TILE_ROWS + i * TILE_ROWS + lane_group();
        if (at >= of.rows || k >= of.inputs) continue;
        const float* from = of.input + size_t(at) * of.inputs + k;
        load(from, numbers.rows[i][0]);
        load(from + 4, numbers.rows[i][1]);
    }
    return numbers;
}

// terms[term][product] are the words of a fragment. A term is the upper half of what those before it leave, 8 of 24 bits;
// rounding would leave no less, and could make an infinity. Of numbers above 10^-33 nothing is left in the end.
__device__ inline void cut_terms(const float (&numbers)[2][4], unsigned (&terms)[TERMS][2][2]) {
    constexpr unsigned UPPER = 0xffff0000u;
#pragma unroll
    for (int i = 0; i < LANE_INPUTS / 2; i++) {
        float first = numbers[i / 2][i % 2 * 2], second = numbers[i / 2][i % 2 * 2 + 1];
#pragma unroll
        for (int term = 0; term < TERMS; term++) {
            const unsigned a = __float_as_uint(first) & UPPER, b = __float_as_uint(second) & UPPER;
            terms[term][i / 2][i % 2] = a >> 16 | b;
            first -= __uint_as_float(a);
            second -= __uint_as_float(b);
        }
    }
}

// Adds a part to a lane's sums, [row tile][output tile].
template <int TILES>
__device__ inline void add_part(const PartWeights<TILES>& weights, const PartRows<TILES>& numbers,
                                float (&sums)[TILES][TILES][4]) {
#pragma unroll
    for (int row = 0; row < TILES; row++) {
        unsigned terms[TERMS][2][2];
        cut_terms(numbers.rows[row], terms);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const uint4 upper = weights.outputs[tile][0], lower = weights.outputs[tile][1];
            const unsigned first[4] = {upper.x, lower.x, upper.y, lower.y};
            const unsigned second[4] = {upper.z, lower.z, upper.w, lower.w};
            float sum[4] = {};
#pragma unroll
            for (int term = TERMS - 1; term >= 0; term--) {
                multiply_add(sum, first, terms[term][0]);
                multiply_add(sum, second, terms[term][1]);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) sums[row][tile][i] += sum[i];
        }
    }
}

// Adds up what the warps have, and writes it: one tile of rows after the other.
template <int TILES>
__device__ inline void join_warps(const Operands& of, const float (&sums)[TILES][TILES][4]) {
    constexpr int OUTPUTS = TILES * TILE_OUTPUTS;
    __shared__ float parts[TENSOR_WARPS][TILE_ROWS][OUTPUTS + BESIDE];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        auto& own = parts[threadIdx.x / WARP];
#pragma unroll
        for (int i = 0; i < TILES * 4; i++) {
            own[lane_member() * 2 + i % 2][i / 2 * 8 + lane_group()] = sums[tile][i / 4][i % 4];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < TILE_ROWS * OUTPUTS; i += TENSOR_WARPS * WARP) {
            float sum = parts[0][i / OUTPUTS][i % OUTPUTS];
            for (int warp = 1; warp < TENSOR_WARPS; warp++) sum += parts[warp][i / OUTPUTS][i % OUTPUTS];
            const int row = (blockIdx.x * TILES + tile) * TILE_ROWS + i / OUTPUTS;
            const int output = blockIdx.y * OUTPUTS + i % OUTPUTS;
            if (row >= of.rows || output >= of.outputs) continue;
            float* target = of.output + size_t(row) * of.outputs + output;
            *target = of.add ? *target + sum : sum;
        }
        __syncthreads();
    }
}

// output[row][i] = Σ input[row][k] · weight[i][k], or += where `add` is set. `inputs` is a multiple of 8. Grid:
// (rows / 8 / TILES, outputs / 16 / TILES), so that blocks that share weights run side by side.
template <int TILES>
__device__ inline void matmul_bf16(const Operands& of) {
    constexpr int AHEAD = PARTS_AHEAD / TILES;
    const int warp = threadIdx.x / WARP, parts = (of.inputs + PART_INPUTS - 1) / PART_INPUTS;
    PartWeights<TILES> ahead[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) ahead[i] = load_weights<TILES>(of, warp + i * TENSOR_WARPS);
    PartRows<TILES> rows_ahead = load_rows<TILES>(of, warp);

    float sums[TILES][TILES][4] = {};
    for (int first = warp; first < parts; first += AHEAD * TENSOR_WARPS) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int part = first + i * TENSOR_WARPS;
            if (part >= parts) break;
            const PartWeights<TILES> weights = ahead[i];
            const PartRows<TILES> numbers = rows_ahead;
            ahead[i] = load_weights<TILES>(of, part + AHEAD * TENSOR_WARPS);
            rows_ahead = load_rows<TILES>(of, part + TENSOR_WARPS);
            add_part(weights, numbers, sums);
        }
    }
    join_warps(of, sums);
}

#define MATMUL_BF16(NAME, TILES)                                                                                     \
    extern "C" __global__ void __launch_bounds__(TENSOR_WARPS * WARP)                                                \
        NAME(const bf16* weight, const float* input, float* output, int rows, int inputs, int outputs, int add) {    \
        matmul_bf16<TILES>({weight, input, output, rows, inputs, outputs, add});                                     \
    }

MATMUL_BF16(matmul_bf16_8, 1)
MATMUL_BF16(matmul_bf16_16, 2)
MATMUL_BF16(matmul_bf16_32, 4)
