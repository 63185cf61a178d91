// What the ranks of a group hand each other: parts of rows. Those of all ranks lie one behind the other, each (rows, own
// columns); rank r has the columns from bounds[r] to bounds[r + 1]. The second dimension of the grid cuts the row.

// A rank's part of whole rows: part[row][i] = whole[row][first + i].
extern "C" __global__ void cut(const float* whole, float* part, int first, int columns, int width) {
    const int i = blockIdx.y * ROW_THREADS + threadIdx.x;
    if (i >= columns) return;
    part[size_t(blockIdx.x) * columns + i] = whole[size_t(blockIdx.x) * width + first + i];
}

// Whole rows of the parts of all ranks.
extern "C" __global__ void place(const float* parts, const int* bounds, float* whole, int rows, int width) {
    const int column = blockIdx.y * ROW_THREADS + threadIdx.x;
    if (column >= width) return;
    int rank = 0;
    while (column >= bounds[rank + 1]) rank++;
    const int first = bounds[rank], columns = bounds[rank + 1] - first;
    const float* part = parts + size_t(rows) * first + size_t(blockIdx.x) * columns;
    whole[size_t(blockIdx.x) * width + column] = part[column - first];
}
