// Products with weights of f32, by plain multiply-adds, for comparisons: a warp computes two columns of up to eight rows,
// its lanes stride over the inputs.
//
// The weights of a warp are read once for all of its rows. Where a row stands among others, and how many there are, does
// not show in its sums: an instance for more rows does the same for each of them.

constexpr int MATMUL_WARPS = 8;
constexpr int MATMUL_COLUMNS = 2;

// Numbers in the 16 bytes that a lane reads at once.
constexpr int MATMUL_VECTOR = 4;

// output[row][column] = Σ input[row][k] · weight[column][k], or += where `add` is set, for rows and columns of
// a grid of (columns / 16, rows / ROWS) blocks. `inputs` is a multiple of 16.
template <int ROWS>
__device__ inline void matmul(const float* weight, const float* input, float* output, int rows, int inputs, int outputs,
                              int add) {
    const int lane = threadIdx.x % WARP;
    const int first_column = (blockIdx.x * MATMUL_WARPS + threadIdx.x / WARP) * MATMUL_COLUMNS;
    const int first_row = blockIdx.y * ROWS;
    if (first_column >= outputs) return;

    // Beyond the last row and column, the last one is computed again and not written.
    const float* columns[MATMUL_COLUMNS];
    const float* sources[ROWS];
    for (int i = 0; i < MATMUL_COLUMNS; i++) columns[i] = weight + size_t(min(first_column + i, outputs - 1)) * inputs;
    for (int i = 0; i < ROWS; i++) sources[i] = input + size_t(min(first_row + i, rows - 1)) * inputs;

    float sums[ROWS * MATMUL_COLUMNS] = {};
#pragma unroll 2
    for (int k = lane * MATMUL_VECTOR; k < inputs; k += WARP * MATMUL_VECTOR) {
        float weights[MATMUL_COLUMNS][MATMUL_VECTOR];
#pragma unroll
        for (int i = 0; i < MATMUL_COLUMNS; i++) load(columns[i] + k, weights[i]);
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            float x[MATMUL_VECTOR];
            load(sources[row] + k, x);
#pragma unroll
            for (int i = 0; i < MATMUL_COLUMNS; i++) {
                float& sum = sums[row * MATMUL_COLUMNS + i];
                for (int j = 0; j < MATMUL_VECTOR; j++) sum = fmaf(x[j], weights[i][j], sum);
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

#define MATMUL(NAME, ROWS)                                                                                           \
    extern "C" __global__ void __launch_bounds__(MATMUL_WARPS * WARP)                                                \
        NAME(const float* weight, const float* input, float* output, int rows, int inputs, int outputs, int add) {   \
        matmul<ROWS>(weight, input, output, rows, inputs, outputs, add);                                             \
    }

MATMUL(matmul_f32_1, 1)
MATMUL(matmul_f32_2, 2)
MATMUL(matmul_f32_4, 4)
MATMUL(matmul_f32_8, 8)
