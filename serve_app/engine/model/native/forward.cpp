// A packed step of a Llama-like model on the CPU, from token ids to logits, in one call.
//
// One OpenMP region runs the whole forward; every phase is a loop over independent tasks with a
// barrier behind it. All matrix products go through one micro-kernel, `tile`: up to ROWS rows of
// activations times a panel of 32 columns. Weights are packed into such panels once; keys and
// values are kept in them, so that attention is the same product over the cache. The panels of
// bfloat16 are what AMX's tiles of weights are as well, so a processor that has them reads the same
// memory.
//
// Batch invariance: a row's sums run over its own inputs in one fixed order, whatever else is in
// the batch and however its prompt was cut into chunks. Results are bitwise the same.
//
// Sources: goto & van de Geijn (2008) for packing and register blocking; Milakov & Gimelshein
// (2018) for the online softmax; Cephes' expf for the exponential.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define TILES  // tests define it with an emulation of the instructions
#endif
#ifdef TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int COLUMNS = 32;  // of a panel, and tokens of a block of the cache
constexpr int LANES = 16;
#ifdef __AVX512F__
constexpr int WIDTH = 16;  // of a register
constexpr int VECTOR_ROWS = 12;  // 24 accumulators, 2 columns and 1 broadcast in 32 registers
#else
constexpr int WIDTH = 8;        // AVX2's; the products' sums must stay in registers
constexpr int VECTOR_ROWS = 6;  // of half a panel: 12 accumulators, 2 columns, 1 broadcast in 16
#endif
constexpr int TILE_ROWS = 16;   // of a tile of AMX
constexpr int TILE_DEPTH = 32;  // inputs of a row in a tile
constexpr int WIDENED = 256;  // inputs of a row that are widened at a time, to stay in the cache
constexpr int MAX_HEAD = 512;
constexpr int ROW_GROUP = 96;  // rows that pass a panel while it is in the nearest caches

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Part __attribute__((vector_size(4 * WIDTH)));
typedef int32_t PartInts __attribute__((vector_size(4 * WIDTH)));

struct bfloat16 {
    uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

inline void narrow(float value, float& out) { out = value; }
inline void narrow(float value, bfloat16& out) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) {
        out.bits = 0x7fc0;
        return;
    }
    out.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

inline Floats splat(float value) { return value - Floats{}; }

inline Floats load(const float* from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

inline void store(bfloat16* to, Floats value) {
#ifdef __AVX512BF16__
    __m256bh packed = _mm512_cvtneps_pbh((__m512)value);
    std::memcpy(to, &packed, sizeof packed);
#else
    for (int i = 0; i < LANES; i++) narrow(value[i], to[i]);
#endif
}

// to[i] = from[i] * factor
template <class T>
inline void scale(const float* from, float factor, int count, T* to) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i) * factor);
    for (; i < count; i++) narrow(from[i] * factor, to[i]);
}

inline float sum(Floats value) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)value);
#else
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) value[i] += value[i + step];
    return value[0];
#endif
}

inline float largest(Floats value) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)value);
#else
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) value[i] = std::max(value[i], value[i + step]);
    return value[0];
#endif
}

inline Floats exponential(Floats x) {
    const Floats low = splat(-87.3f), high = splat(88.3f);
    Ints below = x < low;
    x = x < low ? low : x;
    x = x > high ? high : x;
    Floats scaled = x * 1.44269504088896341f;
    // Adding and taking away 1.5 * 2^23 rounds to the nearest whole number.
    const Floats magic = splat(12582912.f);
    Floats whole = (scaled + magic) - magic;
    Floats rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats y = splat(1.9875691500e-4f);
    y = y * rest + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.f;
    Ints power = __builtin_convertvector(whole, Ints) + 127;
    power <<= 23;
    Floats scale;
    std::memcpy(&scale, &power, sizeof scale);
    Floats result = y * scale;
    return below ? Floats{} : result;
}

// How a number type is laid out in a panel: DEPTH successive inputs of a column side by side.
// A row's numbers go into a product as `Input`.
template <class T>
struct Packed;

template <>
struct Packed<float> {
    static constexpr int DEPTH = 1;
    typedef float Input;
    typedef Part Column;
    static Column column(const float* from) {
        Column column;
        std::memcpy(&column, from, sizeof column);
        return column;
    }
    static Part add(Part sum, const float* row, Column column) { return sum + *row * column; }
};

template <>
struct Packed<bfloat16> {
    static constexpr int DEPTH = 2;
#ifdef __AVX512BF16__
    typedef bfloat16 Input;
    typedef __m512bh Column;
    static Column column(const bfloat16* from) { return (__m512bh)_mm512_loadu_ps(from); }
    static Part add(Part sum, const bfloat16* row, Column column) {
        int32_t pair;
        std::memcpy(&pair, row, 4);
        return (Part)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), column);
    }
#else
    typedef float Input;
    struct Column {
        Part even, odd;
    };
    static Column column(const bfloat16* from) {
        PartInts pairs;
        std::memcpy(&pairs, from, sizeof pairs);
        PartInts even = pairs << 16, odd = pairs & int32_t(0xffff0000);
        Column column;
        std::memcpy(&column.even, &even, sizeof even);
        std::memcpy(&column.odd, &odd, sizeof odd);
        return column;
    }
    static Part add(Part sum, const float* row, Column column) {
        return sum + row[0] * column.even + row[1] * column.odd;
    }
#endif
};

// PARTS registers of a panel's columns, for R rows; `tile` says what of.
template <class T, int R, int PARTS, bool ADD>
void strip(const typename Packed<T>::Input* rows, size_t stride, const T* panel, int depth,
           float* out, size_t out_stride) {
    using P = Packed<T>;
    Part sums[R][PARTS];
    for (int r = 0; r < R; r++)
        for (int part = 0; part < PARTS; part++)
            if (ADD)
                std::memcpy(&sums[r][part], out + r * out_stride + part * WIDTH, sizeof(Part));
            else
                sums[r][part] = Part{};
    for (int k = 0; k < depth; k += P::DEPTH, panel += COLUMNS * P::DEPTH) {
        typename P::Column columns[PARTS];
        for (int part = 0; part < PARTS; part++)
            columns[part] = P::column(panel + part * WIDTH * P::DEPTH);
        for (int r = 0; r < R; r++)
            for (int part = 0; part < PARTS; part++)
                sums[r][part] = P::add(sums[r][part], rows + r * stride + k, columns[part]);
    }
    for (int r = 0; r < R; r++)
        for (int part = 0; part < PARTS; part++)
            std::memcpy(out + r * out_stride + part * WIDTH, &sums[r][part], sizeof(Part));
}

// A whole panel, in as many strips as leave the sums in registers.
template <class T, int R, bool ADD>
void panel_of(const typename Packed<T>::Input* rows, size_t stride, const T* panel, int depth,
              float* out, size_t out_stride) {
    constexpr int PARTS = WIDTH == LANES ? COLUMNS / WIDTH : R <= 2 ? 4 : 2;
    for (int column = 0; column < COLUMNS; column += PARTS * WIDTH)
        strip<T, R, PARTS, ADD>(rows, stride, panel + column * Packed<T>::DEPTH, depth,
                                out + column, out_stride);
}

// out[r][0..32) (+)= rows[r][0..depth) * panel; the panel is [depth / DEPTH][32][DEPTH].
template <class T, int R, bool ADD>
void tile_of(const T* rows, size_t stride, const T* panel, int depth, float* out,
             size_t out_stride) {
    if constexpr (std::is_same_v<T, typename Packed<T>::Input>) {
        panel_of<T, R, ADD>(rows, stride, panel, depth, out, out_stride);
    } else {
        alignas(64) float wide[R][WIDENED];
        for (int begin = 0; begin < depth; begin += WIDENED) {
            const int size = std::min(WIDENED, depth - begin);
            for (int r = 0; r < R; r++)
                for (int i = 0; i < size; i++) wide[r][i] = widen(rows[r * stride + begin + i]);
            const T* part = panel + size_t(begin) * COLUMNS;
            if (ADD || begin)
                panel_of<T, R, true>(wide[0], WIDENED, part, size, out, out_stride);
            else
                panel_of<T, R, false>(wide[0], WIDENED, part, size, out, out_stride);
        }
    }
}

template <class T, bool ADD, int R>
void vector_tile(int count, const T* rows, size_t stride, const T* panel, int depth, float* out,
                 size_t out_stride) {
    if (count == R)
        tile_of<T, R, ADD>(rows, stride, panel, depth, out, out_stride);
    else if constexpr (R > 1)
        vector_tile<T, ADD, R - 1>(count, rows, stride, panel, depth, out, out_stride);
}

// Rows that pass a panel at a time. With AMX, rows of `rows` and `out` up to the next multiple of
// TILE_ROWS are read and written, whatever stands there.
template <class T>
constexpr int ROWS = VECTOR_ROWS;

#ifdef TILES
template <>
constexpr int ROWS<bfloat16> = 2 * TILE_ROWS;

// Of tile 0 to 7: four sums, two of rows, two of columns; all of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// BLOCKS times 16 rows times a panel, in steps of TILE_DEPTH inputs. An instruction sums a row's
// products in one order whatever its other rows hold, so results do not depend on them.
template <bool ADD, int BLOCKS>
void tiles_of(const bfloat16* rows, size_t stride, const bfloat16* panel, int depth, float* out,
              size_t out_stride) {
    const size_t row_bytes = stride * sizeof(bfloat16), out_bytes = out_stride * sizeof(float);
    const size_t pair_bytes = 2 * COLUMNS * sizeof(bfloat16);  // two inputs of all columns
    float* lower = out + TILE_ROWS * out_stride;
    if (ADD) {
        _tile_loadd(0, out, out_bytes);
        _tile_loadd(1, out + LANES, out_bytes);
        if (BLOCKS == 2) {
            _tile_loadd(2, lower, out_bytes);
            _tile_loadd(3, lower + LANES, out_bytes);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (BLOCKS == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    for (int k = 0; k < depth; k += TILE_DEPTH) {
        const bfloat16* columns = panel + size_t(k) * COLUMNS;
        _tile_loadd(6, columns, pair_bytes);
        _tile_loadd(7, columns + 2 * LANES, pair_bytes);
        _tile_loadd(4, rows + k, row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (BLOCKS == 2) {
            _tile_loadd(5, rows + TILE_ROWS * stride + k, row_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, out_bytes);
    _tile_stored(1, out + LANES, out_bytes);
    if (BLOCKS == 2) {
        _tile_stored(2, lower, out_bytes);
        _tile_stored(3, lower + LANES, out_bytes);
    }
}

// The same for any count, and for any depth: what is left of it goes through the vectors.
template <bool ADD>
void tiles(int count, const bfloat16* rows, size_t stride, const bfloat16* panel, int depth,
           float* out, size_t out_stride) {
    const int whole = depth - depth % TILE_DEPTH;
    if (count > TILE_ROWS)
        tiles_of<ADD, 2>(rows, stride, panel, whole, out, out_stride);
    else
        tiles_of<ADD, 1>(rows, stride, panel, whole, out, out_stride);
    if (whole == depth) return;
    for (int row = 0; row < count; row += VECTOR_ROWS)
        vector_tile<bfloat16, true, VECTOR_ROWS>(
            std::min(VECTOR_ROWS, count - row), rows + row * stride + whole, stride,
            panel + size_t(whole) * COLUMNS, depth - whole, out + row * out_stride, out_stride);
}
#endif

// What a thread has to do before its first tile and after its last one.
struct TileScope {
#ifdef TILES
    TileScope() {
        const TileConfig config;
        _tile_loadconfig(&config);
    }
    ~TileScope() { _tile_release(); }
#endif
};

template <class T, bool ADD = false>
void tile(int count, const T* rows, size_t stride, const T* panel, int depth, float* out,
          size_t out_stride) {
#ifdef TILES
    if constexpr (std::is_same_v<T, bfloat16>) {
        tiles<ADD>(count, rows, stride, panel, depth, out, out_stride);
        return;
    }
#endif
    vector_tile<T, ADD, ROWS<T>>(count, rows, stride, panel, depth, out, out_stride);
}

// Say how threads divide the panels of products, before a region begins.
// Where one group of rows passes all panels, reading weights takes the time: guided, so that a thread
// reads most of its panels in a row. A processor's prefetchers begin anew at each jump, and jumping
// every 18 KB halves what two cores read. The last panels go one by one: threads end together.
// Several groups are of different sizes, which equal runs of panels would not balance.
inline void schedule_products(int rows) {
    omp_set_schedule(rows <= ROW_GROUP ? omp_sched_guided : omp_sched_dynamic, 1);
}

// For every panel of a packed matrix and every row: finish(row, panel, 32 sums).
// To be called by all threads of a region; ends with a barrier.
// Who computes which panel is chosen by `schedule_products`.
template <class T, class Finish>
void product(int count, const T* rows, size_t stride, const T* weights, int depth, int panels,
             Finish finish) {
    const int groups = (count + ROW_GROUP - 1) / ROW_GROUP;
#pragma omp for schedule(runtime) collapse(2)
    for (int group = 0; group < groups; group++)
        for (int panel = 0; panel < panels; panel++) {
            const T* packed = weights + size_t(panel) * depth * COLUMNS;
            const int begin = group * ROW_GROUP, end = std::min(count, begin + ROW_GROUP);
            const int tiles = (end - begin + ROWS<T> - 1) / ROWS<T>;
            for (int t = 0, row = begin; t < tiles; t++) {
                alignas(64) float sums[ROWS<T>][COLUMNS];
                const int size = (end - row + tiles - t - 1) / (tiles - t);
                tile<T>(size, rows + row * stride, stride, packed, depth, sums[0], COLUMNS);
                for (int r = 0; r < size; r++) finish(row + r, panel, sums[r]);
                row += size;
            }
        }
}

}  // namespace

extern "C" {

struct Layer {
    const void* qkv;       // panels, (heads + 2 * kv_heads) * head_dim columns
    const float* qkv_bias; // padded to whole panels, or null
    const void* out;       // panels, hidden columns
    const void* gate_up;   // panels of 16 gate and the same 16 up columns
    const void* down;      // panels, hidden columns
    const float* attention_norm;
    const float* mlp_norm;
    const float* query_norm;  // or null
    const float* key_norm;    // or null
    void* cache;  // (kv_heads, blocks) of keys (head_dim / DEPTH, 32 tokens, DEPTH) and values
                  // (value_panels, 32 tokens / DEPTH, 32, DEPTH): one stream a head
    int32_t window;  // tokens that a query sees, itself included; 0 is all
};

struct Model {
    int32_t layers, hidden, intermediate, heads, kv_heads, head_dim, rotary, vocabulary;
    int32_t blocks, threads;
    float eps, scale;
    const Layer* layer;
    const void* embedding;  // rows, or null: read from the packed head
    const void* head;       // panels, vocabulary columns
    const float* norm;
    const float* cos;  // (positions, rotary / 2)
    const float* sin;
};

struct Span {
    int32_t q_start, q_count, kv_start, kv_count;
};

struct Step {
    int32_t tokens, spans, kept;
    const int32_t* ids;
    const int32_t* positions;
    const int32_t* slots;
    const Span* span;
    const int32_t* keep;  // packed rows whose logits are wanted
    float* x;        // (tokens, hidden)
    void* normed;    // (tokens, hidden)
    float* qkv;      // (tokens, padded qkv columns)
    void* query;     // (tokens, heads, head_dim)
    void* attended;  // (tokens, heads, head_dim)
    void* inner;     // (tokens, intermediate)
    float* logits;   // (kept, vocabulary)
};

}  // extern "C"

namespace {

inline int panels_of(int columns) { return (columns + COLUMNS - 1) / COLUMNS; }

template <class T>
struct Forward {
    static constexpr int DEPTH = Packed<T>::DEPTH;
    const Model& m;
    const Step& s;
    const int value_panels = panels_of(m.head_dim);
    const size_t key_block = size_t(m.head_dim) * COLUMNS;
    const size_t value_block = size_t(value_panels) * COLUMNS * COLUMNS;
    const size_t block_size = key_block + value_block;
    const int columns = (m.heads + 2 * m.kv_heads) * m.head_dim;
    const size_t qkv_stride = size_t(panels_of(columns)) * COLUMNS;

    void embed(int token) const {
        float* x = s.x + size_t(token) * m.hidden;
        const int id = s.ids[token];
        if (m.embedding) {
            const T* row = static_cast<const T*>(m.embedding) + size_t(id) * m.hidden;
            for (int i = 0; i < m.hidden; i++) x[i] = widen(row[i]);
            return;
        }
        const T* column = static_cast<const T*>(m.head) +
                          size_t(id / COLUMNS) * m.hidden * COLUMNS + (id % COLUMNS) * DEPTH;
        for (int i = 0; i < m.hidden; i++)
            x[i] = widen(column[(i / DEPTH) * COLUMNS * DEPTH + i % DEPTH]);
    }

    // out = x / rms(x) * weight; Zhang & Sennrich (2019).
    template <class Out>
    void norm(const float* x, const float* weight, int size, Out* out) const {
        Floats squares{};
        int i = 0;
        for (; i + LANES <= size; i += LANES) squares += load(x + i) * load(x + i);
        float total = sum(squares);
        for (; i < size; i++) total += x[i] * x[i];
        const float factor = 1.f / std::sqrt(total / size + m.eps);
        for (i = 0; i + LANES <= size; i += LANES)
            store(out + i, load(x + i) * factor * load(weight + i));
        for (; i < size; i++) narrow(x[i] * factor * weight[i], out[i]);
    }

    // Rotates pairs (i, i + rotary / 2) by the token's position; Su et al. (2021).
    void rotate(float* head, int position) const {
        const int half = m.rotary / 2;
        const float* cos = m.cos + size_t(position) * half;
        const float* sin = m.sin + size_t(position) * half;
        for (int i = 0; i < half; i++) {
            const float a = head[i], b = head[i + half];
            head[i] = a * cos[i] - b * sin[i];
            head[i + half] = b * cos[i] + a * sin[i];
        }
    }

    T* block_of(const Layer& layer, int head, int slot) const {
        return static_cast<T*>(layer.cache) +
               (size_t(head) * m.blocks + slot / COLUMNS) * block_size;
    }

    void place_query(const Layer& layer, int token, int head) const {
        float* from = s.qkv + token * qkv_stride + head * m.head_dim;
        if (layer.query_norm) norm(from, layer.query_norm, m.head_dim, from);
        rotate(from, s.positions[token]);
        scale(from, 1.f, m.head_dim,
              static_cast<T*>(s.query) + (size_t(token) * m.heads + head) * m.head_dim);
    }

    void place_key(const Layer& layer, int token, int head) const {
        float* from = s.qkv + token * qkv_stride + (m.heads + head) * m.head_dim;
        if (layer.key_norm) norm(from, layer.key_norm, m.head_dim, from);
        rotate(from, s.positions[token]);
        const int slot = s.slots[token], lane = slot % COLUMNS;
        T* block = block_of(layer, head, slot);
        alignas(64) T key[MAX_HEAD];
        scale(from, 1.f, m.head_dim, key);
        for (int i = 0; i < m.head_dim; i += DEPTH)
            std::memcpy(block + (i * COLUMNS + lane * DEPTH), key + i, DEPTH * sizeof(T));
    }

    void place_value(const Layer& layer, int token, int head) const {
        const float* from =
            s.qkv + token * qkv_stride + (m.heads + m.kv_heads + head) * m.head_dim;
        const int slot = s.slots[token], lane = slot % COLUMNS;
        T* block = block_of(layer, head, slot) + key_block;
        // What an earlier user left behind is multiplied by zero, so it must be a number.
        if (lane == 0) std::memset(block, 0, value_block * sizeof(T));
        alignas(64) T value[MAX_HEAD];
        scale(from, 1.f, m.head_dim, value);
        for (int i = 0; i < m.head_dim; i++) {
            T* panel = block + size_t(i / COLUMNS) * COLUMNS * COLUMNS;
            panel[(lane / DEPTH * COLUMNS + i % COLUMNS) * DEPTH + lane % DEPTH] = value[i];
        }
    }

    // A span's tokens are placed by one thread: the first of a block clears it for the others.
    void place_span(const Layer& layer, const Span& span, int place) const {
        for (int token = span.q_start; token < span.q_start + span.q_count; token++) {
            if (place < m.heads)
                place_query(layer, token, place);
            else if (place < m.heads + m.kv_heads)
                place_key(layer, token, place - m.heads);
            else
                place_value(layer, token, place - m.heads - m.kv_heads);
        }
    }

    // Query rows of one span and one key head: row r is token r / group, head r % group.
    void attend(const Layer& layer, const Span& span, int kv_head, int first) const {
        const int group = m.heads / m.kv_heads;
        const int count = std::min(ROWS<T>, span.q_count * group - first);
        alignas(64) float scores[ROWS<T>][COLUMNS];
        alignas(64) T weights[ROWS<T>][COLUMNS];
        alignas(64) float out[ROWS<T> * MAX_HEAD];
        float top[ROWS<T>];
        Floats total[ROWS<T>];
        const T* query[ROWS<T>];
        int position[ROWS<T>];
        const int out_stride = value_panels * COLUMNS;
        const int start = span.kv_count - span.q_count;
        alignas(64) T packed[ROWS<T> * MAX_HEAD];
        for (int r = 0; r < count; r++) {
            const int token = (first + r) / group, head = kv_head * group + (first + r) % group;
            query[r] = static_cast<const T*>(s.query) +
                       (size_t(span.q_start + token) * m.heads + head) * m.head_dim;
            std::memcpy(packed + r * m.head_dim, query[r], m.head_dim * sizeof(T));
            position[r] = start + token;
            top[r] = -INFINITY;
            total[r] = Floats{};
            std::memset(out + r * out_stride, 0, out_stride * sizeof(float));
        }
        const int last = position[count - 1] / COLUMNS;
        const int begin =
            layer.window ? std::max(0, position[0] - layer.window + 1) / COLUMNS : 0;
        const T* keys = block_of(layer, kv_head, span.kv_start) + begin * block_size;
        for (int block = begin; block <= last; block++, keys += block_size) {
            tile<T>(count, packed, m.head_dim, keys, m.head_dim, scores[0], COLUMNS);
            for (int r = 0; r < count; r++)
                soften(scores[r], weights[r], position[r] - block * COLUMNS, layer.window, top[r],
                       total[r], out + r * out_stride);
            const T* values = keys + key_block;
            for (int panel = 0; panel < value_panels; panel++)
                tile<T, true>(count, weights[0], COLUMNS, values + panel * COLUMNS * COLUMNS,
                              COLUMNS, out + panel * COLUMNS, out_stride);
        }
        for (int r = 0; r < count; r++) {
            T* to = static_cast<T*>(s.attended) + (query[r] - static_cast<const T*>(s.query));
            scale(out + r * out_stride, 1.f / sum(total[r]), m.head_dim, to);
        }
    }

    // One block of the online softmax; tokens after `last`, or out of its window, weigh nothing.
    void soften(float* scores, T* weights, int last, int window, float& top, Floats& total,
                float* out) const {
        Floats low = load(scores) * m.scale, high = load(scores + LANES) * m.scale;
        if (last < COLUMNS - 1 || (window && last >= window)) {
            const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            const Floats never = splat(-INFINITY);
            const int oldest = window ? last - window : -1;
            low = ((lane > last) | (lane <= oldest)) ? never : low;
            high = ((lane + LANES > last) | (lane + LANES <= oldest)) ? never : high;
        }
        const float now = std::max(top, largest(low > high ? low : high));
        if (now == -INFINITY) {  // a whole block before the window of this row
            std::memset(weights, 0, COLUMNS * sizeof(T));
            return;
        }
        if (now != top) {
            const float factor = top == -INFINITY ? 0.f : exponential(splat(top - now))[0];
            for (int i = 0; i < value_panels * COLUMNS; i += LANES)
                store(out + i, load(out + i) * factor);
            total *= factor;
            top = now;
        }
        low = exponential(low - now);
        high = exponential(high - now);
        total += low + high;
        store(weights, low);
        store(weights + LANES, high);
    }

    void norms(const float* weight) const {
#pragma omp for schedule(static)
        for (int token = 0; token < s.tokens; token++)
            norm(s.x + size_t(token) * m.hidden, weight, m.hidden,
                 static_cast<T*>(s.normed) + size_t(token) * m.hidden);
    }

    void add(int row, int panel, const float* sums) const {
        const int begin = panel * COLUMNS, size = std::min(COLUMNS, m.hidden - begin);
        float* x = s.x + size_t(row) * m.hidden + begin;
        if (size == COLUMNS) {
            store(x, load(x) + load(sums));
            store(x + LANES, load(x + LANES) + load(sums + LANES));
        } else {
            for (int i = 0; i < size; i++) x[i] += sums[i];
        }
    }

    void attention(const Layer& layer) const {
        product<T>(s.tokens, static_cast<const T*>(s.normed), m.hidden,
                   static_cast<const T*>(layer.qkv), m.hidden, panels_of(columns),
                   [&](int row, int panel, const float* sums) {
                       float* to = s.qkv + row * qkv_stride + panel * COLUMNS;
                       for (int i = 0; i < COLUMNS; i += LANES) {
                           Floats value = load(sums + i);
                           if (layer.qkv_bias)
                               value += load(layer.qkv_bias + panel * COLUMNS + i);
                           store(to + i, value);
                       }
                   });
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (int place = 0; place < m.heads + 2 * m.kv_heads; place++)
            for (int i = 0; i < s.spans; i++) place_span(layer, s.span[i], place);
        // Late chunks see the most keys; they go first so that no thread ends with a long one.
        const int64_t chunks = chunks_of(widest());
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = chunks * s.spans * m.kv_heads - 1; task >= 0; task--) {
            const Span& span = s.span[task / m.kv_heads % s.spans];
            const int64_t chunk = task / m.kv_heads / s.spans;
            if (chunk < chunks_of(span.q_count))
                attend(layer, span, int(task % m.kv_heads), int(chunk) * ROWS<T>);
        }
        product<T>(s.tokens, static_cast<const T*>(s.attended), size_t(m.heads) * m.head_dim,
                   static_cast<const T*>(layer.out), m.heads * m.head_dim, panels_of(m.hidden),
                   [&](int row, int panel, const float* sums) { add(row, panel, sums); });
    }

    int64_t chunks_of(int tokens) const {
        return (int64_t(tokens) * (m.heads / m.kv_heads) + ROWS<T> - 1) / ROWS<T>;
    }

    int widest() const {
        int most = 0;
        for (int i = 0; i < s.spans; i++) most = std::max(most, s.span[i].q_count);
        return most;
    }

    void mlp(const Layer& layer) const {
        T* inner = static_cast<T*>(s.inner);
        product<T>(s.tokens, static_cast<const T*>(s.normed), m.hidden,
                   static_cast<const T*>(layer.gate_up), m.hidden, m.intermediate / LANES,
                   [&](int row, int panel, const float* sums) {
                       const Floats gate = load(sums);
                       const Floats swish = gate / (1.f + exponential(-gate));
                       store(inner + size_t(row) * m.intermediate + panel * LANES,
                             swish * load(sums + LANES));
                   });
        product<T>(s.tokens, inner, m.intermediate, static_cast<const T*>(layer.down),
                   m.intermediate, panels_of(m.hidden),
                   [&](int row, int panel, const float* sums) { add(row, panel, sums); });
    }

    void logits() const {
        T* normed = static_cast<T*>(s.normed);
#pragma omp for schedule(static)
        for (int i = 0; i < s.kept; i++)
            norm(s.x + size_t(s.keep[i]) * m.hidden, m.norm, m.hidden,
                 normed + size_t(i) * m.hidden);
        product<T>(s.kept, normed, m.hidden, static_cast<const T*>(m.head), m.hidden,
                   panels_of(m.vocabulary), [&](int row, int panel, const float* sums) {
                       const int begin = panel * COLUMNS;
                       std::memcpy(s.logits + size_t(row) * m.vocabulary + begin, sums,
                                   std::min(COLUMNS, m.vocabulary - begin) * sizeof(float));
                   });
    }

    void run() const {
        schedule_products(s.tokens);
#pragma omp parallel num_threads(m.threads)
        {
            [[maybe_unused]] const TileScope scope;
#pragma omp for schedule(static)
            for (int token = 0; token < s.tokens; token++) embed(token);
            for (int i = 0; i < m.layers; i++) {
                norms(m.layer[i].attention_norm);
                attention(m.layer[i]);
                norms(m.layer[i].mlp_norm);
                mlp(m.layer[i]);
            }
            logits();
        }
    }
};

// One panel of a packed matrix: of each of its columns the words one after the other, 32 columns
// side by side. Each line of the source is read once and whole, whatever its rows are apart.
void pack_panel(const char* const* columns, size_t words, char* to) {
    constexpr size_t WORD = 4, CHUNK = 64;  // a word is what `Packed<T>::DEPTH` numbers take
    uint32_t part[COLUMNS][CHUNK];
    for (size_t begin = 0; begin < words; begin += CHUNK) {
        const size_t count = std::min(CHUNK, words - begin);
        for (int column = 0; column < COLUMNS; column++)
            if (columns[column])
                std::memcpy(part[column], columns[column] + begin * WORD, count * WORD);
            else
                std::memset(part[column], 0, count * WORD);
        for (size_t word = 0; word < count; word++) {
            uint32_t line[COLUMNS];
            for (int column = 0; column < COLUMNS; column++) line[column] = part[column][word];
            std::memcpy(to + (begin + word) * sizeof line, line, sizeof line);
        }
    }
}

}  // namespace

// Write the panels of a matrix; `columns` has the address of each column's inputs, a multiple of
// 32 of them, null for zeros.
extern "C" void pack_panels(const char* const* columns, int64_t panels, int64_t words, char* to,
                            int32_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t panel = 0; panel < panels; panel++)
        pack_panel(columns + panel * COLUMNS, size_t(words),
                   to + size_t(panel) * size_t(words) * COLUMNS * 4);
}

// Ask the kernel for AMX's registers, once a process; returns whether they may be used.
extern "C" int prepare_forward() {
#if defined(__AMX_TILE__) && defined(SYS_arch_prctl)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 1;
#endif
}

// Which instructions multiply bfloat16.
extern "C" const char* forward_kernel() {
#if defined(TILES)
    return "amx_bf16";
#elif defined(__AVX512BF16__)
    return "avx512_bf16";
#elif defined(__AVX512F__)
    return "avx512";
#else
    return "vectors of 8";
#endif
}

extern "C" void forward_float32(const Model* model, const Step* step) {
    Forward<float>{*model, *step}.run();
}

extern "C" void forward_bfloat16(const Model* model, const Step* step) {
    Forward<bfloat16>{*model, *step}.run();
}
