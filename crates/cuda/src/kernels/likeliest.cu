// Lists of the likeliest tokens in place of rows of logits: a rank's own tokens with the largest G + scale · z, or z, larger
// ones first and ties to the lower id. What `top_of_slice` of crates/decode does on a CPU, bit for bit; noise is what its
// noise.rs says, in the same rounded operations.
//
// Two launches for all lists of a step. In the first, a block takes 4096 tokens, ranks them in registers and hands on the best
// of them; in the second, a block joins what those have found for one list. Both search for the place of the last token that is
// listed, bit by bit from the top, and count how many reach it: no atomics, no order of arrival. The search ends where
// exactly as many reach it as are wanted, most often after some twenty bits.
//
// Each logit is read once, and written once into the ring of rows behind lists. That is the floor: 8 bytes for a token, 1 MB for
// a row of 128k, a third of a microsecond at 3 TB/s. For few rows, what takes longer are the bits of the searches, each of
// which the threads of a block wait for.

constexpr int LIST_THREADS = 256;

// Of each thread: four tokens that share their random words.
constexpr int LIST_QUADS = 4;

// Tokens of a list, at most.
constexpr int LIST_MAX = 1024;

// A list that is wanted; the same in lister.rs.
struct ListRecord {
    float scale;
    int noisy;
    unsigned seed[2]; // its low half first
    unsigned choice;
    unsigned position;
    int count; // 0: too many are wanted
    int begin; // of its tokens among the listed ones
    int slot;  // of its row in the ring; -1: that is not kept
};

// Philox4x32-10: the random words of tokens 4 · quad to 4 · quad + 3.
__device__ inline void random_words(const ListRecord& list, unsigned quad, unsigned (&words)[4]) {
    unsigned c0 = quad, c1 = list.position, c2 = list.choice, c3 = 0;
    unsigned k0 = list.seed[0], k1 = list.seed[1];
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned long long left = 0xd2511f53ull * c0, right = 0xcd9e8d57ull * c2;
        c0 = unsigned(right >> 32) ^ c1 ^ k0;
        c1 = unsigned(right);
        c2 = unsigned(left >> 32) ^ c3 ^ k1;
        c3 = unsigned(left);
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

// x = mantissa · 2^exponent with a mantissa in [√½, √2): x positive and normal.
__device__ inline void split(float x, float& mantissa, float& exponent) {
    constexpr unsigned SQRT_HALF = 0x3f3504f3u, ONE = 0x3f800000u;
    const unsigned shifted = __float_as_uint(x) + (ONE - SQRT_HALF);
    exponent = float(int(shifted >> 23) - 127);
    mantissa = __uint_as_float((shifted & 0x007fffffu) + SQRT_HALF);
}

// ln((1 + f) · 2^e) for f in [√½ - 1, √2 - 1]. Nothing is fused here, as nothing is on the CPU.
__device__ inline float ln_of(float f, float e) {
    float p = 7.0376836e-2f;
    p = p * f - 1.151461e-1f;
    p = p * f + 1.16769984e-1f;
    p = p * f - 1.2420141e-1f;
    p = p * f + 1.4249323e-1f;
    p = p * f - 1.6668057e-1f;
    p = p * f + 2.0000715e-1f;
    p = p * f - 2.4999994e-1f;
    p = p * f + 3.333333e-1f;
    const float square = f * f;
    const float tail = square * f * p + e * -2.1219444e-4f - 0.5f * square;
    return (f + tail) + e * 0.6933594f;
}

// G = -ln(-ln(1 - x)), x = (h + ½) · 2^-32.
__device__ inline float gumbel(unsigned h) {
    constexpr float UNIT = 1.0f / 4294967296.0f;
    const float x = (float(h) + 0.5f) * UNIT;
    const float complement = (float(~h) + 0.5f) * UNIT;
    float mantissa, exponent;
    split(complement, mantissa, exponent);
    const bool near = x < 0.2928932f;
    const float exponential = -ln_of(near ? -x : mantissa - 1.0f, near ? 0.0f : exponent);
    split(exponential, mantissa, exponent);
    return -ln_of(mantissa - 1.0f, exponent);
}

// By which a token is listed.
__device__ inline float place_of(const ListRecord& list, float logit, unsigned word) {
    return list.noisy ? gumbel(word) + list.scale * logit : logit;
}

// A number in the order of places, larger for the lower id where these are equal, as zeros of both signs are; 0: no place.
__device__ inline unsigned long long key_of(float place, int id) {
    const float nothing = __uint_as_float(0xff800000u); // -∞
    if (!(place > nothing)) return 0;
    const unsigned bits = __float_as_uint(place + 0.0f);
    const unsigned ordered = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
    return static_cast<unsigned long long>(ordered) << 32 | ~unsigned(id);
}

// The sum over a block. Calls with even and odd `turn` alternate: who still reads the sums of one meets nobody who writes them.
__device__ inline int block_sum(int value, int turn) {
    __shared__ int sums[2][LIST_THREADS / WARP];
    for (int mask = WARP / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(ALL_LANES, value, mask);
    int* parts = sums[turn % 2];
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = value;
    __syncthreads();
    int sum = 0;
    for (int warp = 0; warp < LIST_THREADS / WARP; warp++) sum += parts[warp];
    return sum;
}

// The sum over the threads before, and over all; once in a kernel.
__device__ inline int block_scan(int value, int& all) {
    __shared__ int sums[LIST_THREADS / WARP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int before = 0, sum = value;
    for (int mask = 1; mask < WARP; mask *= 2) {
        const int other = __shfl_xor_sync(ALL_LANES, sum, mask);
        if (lane & mask) before += other;
        sum += other;
    }
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    all = 0;
    for (int i = 0; i < LIST_THREADS / WARP; i++) {
        if (i < warp) before += sums[i];
        all += sums[i];
    }
    return before;
}

// The largest key that `wanted` keys of the block reach, or 1, which all do that are one: no two are equal. `reached(key)` counts
// a thread's own.
template <typename Reached>
__device__ inline unsigned long long last_key(int wanted, Reached reached) {
    unsigned long long key = 0;
    for (int bit = 63; bit >= 0; bit--) {
        const unsigned long long raised = key | 1ull << bit;
        const int found = block_sum(reached(raised), bit);
        if (found >= wanted) key = raised;
        if (found == wanted) break;
    }
    return key > 0 ? key : 1;
}

// Lists of parts: candidates[list][part × count + i] are keys, in any order, zeros behind them. Grid: (parts, lists). `scores`
// are the rows behind lists, (lists, columns), of the tokens from `first` on; `kept` is the ring of rows, (slots, columns).
extern "C" __global__ void __launch_bounds__(LIST_THREADS)
    list_parts(const float* scores, int columns, int first, const ListRecord* lists, float* kept,
               unsigned long long* candidates, int stride) {
    const ListRecord list = lists[blockIdx.y];
    const float* row = scores + size_t(blockIdx.y) * columns;
    unsigned long long keys[LIST_QUADS * 4];
#pragma unroll
    for (int i = 0; i < LIST_QUADS; i++) {
        const int quad = first / 4 + (blockIdx.x * LIST_QUADS + i) * LIST_THREADS + threadIdx.x;
        unsigned words[4] = {};
        if (list.noisy) random_words(list, quad, words);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int id = quad * 4 + j, at = id - first;
            const bool is_own = at >= 0 && at < columns;
            const float logit = is_own ? row[at] : 0.0f;
            if (is_own && list.slot >= 0) kept[size_t(list.slot) * columns + at] = logit;
            keys[i * 4 + j] = is_own ? key_of(place_of(list, logit, words[j]), id) : 0;
        }
    }
    if (list.count == 0) return;

    const auto reached = [&keys](unsigned long long key) {
        int count = 0;
#pragma unroll
        for (int i = 0; i < LIST_QUADS * 4; i++) count += keys[i] >= key;
        return count;
    };
    const unsigned long long last = last_key(list.count, reached);
    int all;
    int next = block_scan(reached(last), all);
    unsigned long long* part = candidates + size_t(blockIdx.y) * stride + size_t(blockIdx.x) * list.count;
#pragma unroll
    for (int i = 0; i < LIST_QUADS * 4; i++) {
        if (keys[i] >= last) part[next++] = keys[i];
    }
    for (int i = all + threadIdx.x; i < list.count; i += LIST_THREADS) part[i] = 0;
}

// Lists of rows out of those of their parts: place, id and logit of each token, best first; where there are too few, places that
// are no numbers follow. A block for each list.
extern "C" __global__ void __launch_bounds__(LIST_THREADS)
    list_rows(const float* scores, int columns, int first, const ListRecord* lists, const unsigned long long* candidates,
              int stride, int parts, unsigned* listed) {
    __shared__ unsigned long long chosen[LIST_MAX];
    const ListRecord list = lists[blockIdx.x];
    if (list.count == 0) return;
    const unsigned long long* keys = candidates + size_t(blockIdx.x) * stride;
    const int count = parts * list.count;
    const auto reached = [keys, count](unsigned long long key) {
        int found = 0;
        for (int i = threadIdx.x; i < count; i += LIST_THREADS) found += keys[i] >= key;
        return found;
    };
    const unsigned long long last = last_key(list.count, reached);
    int all;
    int next = block_scan(reached(last), all);
    for (int i = threadIdx.x; i < count; i += LIST_THREADS) {
        if (keys[i] >= last) chosen[next++] = keys[i];
    }
    __syncthreads();

    const float* row = scores + size_t(blockIdx.x) * columns;
    unsigned* tokens = listed + size_t(list.begin) * 3;
    for (int i = threadIdx.x; i < list.count; i += LIST_THREADS) {
        if (i >= all) {
            tokens[i * 3] = 0x7fc00000u; // no number
            tokens[i * 3 + 1] = tokens[i * 3 + 2] = 0;
            continue;
        }
        int better = 0;
        for (int other = 0; other < all; other++) better += chosen[other] > chosen[i];
        const unsigned id = ~unsigned(chosen[i]);
        const float logit = row[int(id) - first];
        unsigned words[4] = {};
        if (list.noisy) random_words(list, id / 4, words);
        // No index into registers.
        const unsigned word = id % 4 == 0 ? words[0] : id % 4 == 1 ? words[1] : id % 4 == 2 ? words[2] : words[3];
        tokens[better * 3] = __float_as_uint(place_of(list, logit, word));
        tokens[better * 3 + 1] = id;
        tokens[better * 3 + 2] = __float_as_uint(logit);
    }
}
