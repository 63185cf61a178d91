// Products with weights: a warp computes two columns of up to eight rows, its lanes stride over the inputs.
//
// The weights of a warp are read once for all of its rows; decoding is bound by that. Where a row stands among
// others, and how many there are, does not show in its sums: an instance for more rows does the same for each of them.

constexpr int MATMUL_WARPS = 8;
constexpr int MATMUL_COLUMNS = 2;

// output[row][column] = Σ input[row][k] · weight[column][k], or += where `add` is set, for rows and columns of
// a grid of (columns / 16, rows / ROWS) blocks. `inputs` is a multiple of 16.
template <typename Weight, int ROWS>
__device__ inline void matmul(const Weight* weight, const float* input, float* output, int rows, int inputs, int outputs,
                              int add) {
    const int lane = threadIdx.x % WARP;
    const int first_column = (blockIdx.x * MATMUL_WARPS + threadIdx.x / WARP) * MATMUL_COLUMNS;
    const int first_row = blockIdx.y * ROWS;
    if (first_column >= outputs) return;

    // Beyond the last row and column, the last one is computed again and not written.
    const Weight* columns[MATMUL_COLUMNS];
    const float* sources[ROWS];
    for (int i = 0; i < MATMUL_COLUMNS; i++) columns[i] = weight + size_t(min(first_column + i, outputs - 1)) * inputs;
    for (int i = 0; i < ROWS; i++) sources[i] = input + size_t(min(first_row + i, rows - 1)) * inputs;

    constexpr int LENGTH = VECTOR<Weight>;
    float sums[ROWS * MATMUL_COLUMNS] = {};
#pragma unroll 2
    for (int k = lane * LENGTH; k < inputs; k += WARP * LENGTH) {
        float weights[MATMUL_COLUMNS][LENGTH];
#pragma unroll
        for (int i = 0; i < MATMUL_COLUMNS; i++) load(columns[i] + k, weights[i]);
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
#pragma unroll
            for (int part = 0; part < LENGTH; part += 4) {
                float x[4];
                load(sources[row] + k + part, x);
#pragma unroll
                for (int i = 0; i < MATMUL_COLUMNS; i++) {
                    float& sum = sums[row * MATMUL_COLUMNS + i];
                    for (int j = 0; j < 4; j++) sum = fmaf(x[j], weights[i][part + j], sum);
                }
            }
        }
    }

    const float sum = warp_sums(sums);
    constexpr int LANES_OF_A_SUM = WARP / (ROWS * MATMUL_COLUMNS);
    const int row = first_row + lane / LANES_OF_A_SUM / MATMUL_COLUMNS;
    const int column = first_column + lane / LANES_OF_A_SUM % MATMUL_COLUMNS;
    if (lane % LANES_OF_A_SUM == 0 && row < rows && column < outputs) {
        float* target = output + size_t(row) * outputs + column;
        *target = add ? *target + sum : sum;
    }
}

#define MATMUL(NAME, WEIGHT, ROWS)                                                                                   \
    extern "C" __global__ void __launch_bounds__(MATMUL_WARPS * WARP)                                                \
        NAME(const WEIGHT* weight, const float* input, float* output, int rows, int inputs, int outputs, int add) {  \
        matmul<WEIGHT, ROWS>(weight, input, output, rows, inputs, outputs, add);                                     \
    }

MATMUL(matmul_f32_1, float, 1)
MATMUL(matmul_f32_2, float, 2)
MATMUL(matmul_f32_4, float, 4)
MATMUL(matmul_f32_8, float, 8)
MATMUL(matmul_bf16_1, bf16, 1)
MATMUL(matmul_bf16_2, bf16, 2)
MATMUL(matmul_bf16_4, bf16, 4)
MATMUL(matmul_bf16_8, bf16, 8)
