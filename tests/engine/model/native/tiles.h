// AMX's instructions in plain C++, so that the code that uses them runs on any processor.
//
// As Intel describes them: a tile is 16 rows of 64 bytes; TDPBF16PS adds to each of 16 x 16 sums
// the products of 16 pairs, in order. Sums are float32; denormals are not flushed here.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <immintrin.h>  // its own names first, which are replaced below
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

#define TILES

namespace emulated {

struct Tile {
    alignas(64) unsigned char bytes[16][64];
};

inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline float value(const unsigned char* at) {
    uint16_t half;
    std::memcpy(&half, at, 2);
    uint32_t bits = uint32_t(half) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

inline void load(int tile, const void* from, size_t stride) {
    if (!configured) __builtin_trap();
    for (int row = 0; row < 16; row++)
        std::memcpy(tiles[tile].bytes[row], static_cast<const char*>(from) + row * stride, 64);
}

inline void store(int tile, void* to, size_t stride) {
    if (!configured) __builtin_trap();
    for (int row = 0; row < 16; row++)
        std::memcpy(static_cast<char*>(to) + row * stride, tiles[tile].bytes[row], 64);
}

inline void multiply(int sums, int rows, int columns) {
    if (!configured) __builtin_trap();
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float sum;
            std::memcpy(&sum, tiles[sums].bytes[m] + 4 * n, 4);
            for (int pair = 0; pair < 16; pair++)
                for (int part = 0; part < 2; part++)
                    sum += value(tiles[rows].bytes[m] + 4 * pair + 2 * part) *
                           value(tiles[columns].bytes[pair] + 4 * n + 2 * part);
            std::memcpy(tiles[sums].bytes[m] + 4 * n, &sum, 4);
        }
}

inline void configure(const void* config) {
    const auto* bytes = static_cast<const uint8_t*>(config);
    configured = bytes[0] == 1;
    for (int tile = 0; tile < 8; tile++)
        configured &= bytes[16 + 2 * tile] == 64 && bytes[48 + tile] == 16;
}

}  // namespace emulated

#define _tile_loadconfig(config) emulated::configure(config)
#define _tile_release() (emulated::configured = false)
#define _tile_zero(tile) std::memset(emulated::tiles[tile].bytes, 0, 1024)
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_dpbf16ps(sums, rows, columns) emulated::multiply(sums, rows, columns)
