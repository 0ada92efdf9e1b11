// Attention of all tokens of a call over the caches of their rows, shared out among threads.
#ifndef WRITEHEAD_LOOKUP_H
#define WRITEHEAD_LOOKUP_H

#include <memory>
#include <vector>

#include "attention.h"
#include "buffer.h"
#include "threads.h"
#include "writehead.h"

namespace wh {

// A token of a call, by the row of the batch that it belongs to and its position there.
struct Token {
    int row, pos;
};

// What a layer adds to the queries and the cache.
struct Look {
    int layer;            // of the cache
    Reach reach;
    float scale;          // of the scores
    const float* slopes;  // of the query heads, or null
};

// How the tokens of one call read one cache; the plan serves all of its layers.
//
// The query heads that share a key/value head, of all tokens of one row, are rows of tiles. Where tiles are too
// few for the threads, each reads the cache in several parts, which `collect` merges. How it is cut depends on the
// call and the number of threads alone, so that results do not change from run to run.
class Lookup {
  public:
    // Plans; tokens of a row stand together. The caches hold the keys up to the tokens themselves.
    void plan(const wh_cache& cache, const std::vector<Token>& tokens, int threads);

    // Computes, on all threads; q holds the heads of each token side by side, `apart` numbers from token to token.
    void read(Team& team, const Look& look, const float* q, int apart);

    // Writes the heads of one token side by side.
    void collect(int token, float* to) const;

  private:
    // A piece of work: slots [first, last) of a part and one of the key/value heads, which are a unit.
    struct Piece {
        int part, head, first, last;
    };

    // The queries of a unit that a thread has packed, for this piece of work and the next.
    struct Packed {
        int part, head;
        int32_t pos[kTileRows];
        float slope[kTileRows], grain[kTileRows];
    };

    struct Part {
        int first, last;  // rows of the queries of one batch row: token * group + head
        int token;        // the first token of that batch row
        int slots;        // that may be read
    };

    void cut(int threads);
    size_t key_bytes() const;  // of a slot
    size_t value_bytes() const;
    Keys keys_at(const Part& part, int head, const Look& look) const;
    void pack(Packed& packed, const Piece& piece, const Look& look, const float* q, int apart, float* scratch) const;
    void read_piece(size_t i, const Look& look, const float* q, int apart, int thread);
    void merge(size_t unit, int row, int rows, float* to) const;

    wh_cache cache_{};
    std::vector<Token> tokens_;
    int group_ = 1, wide_ = 0, rows_ = 0;
    std::vector<Part> parts_;
    std::vector<int> part_of_;  // token -> the first part of its batch row
    std::vector<Piece> pieces_;     // as many for each thread, those of a unit one behind the other
    std::vector<size_t> first_of_;  // unit -> its first piece, and the end
    std::vector<Packed> packed_;    // of each thread
    Buffer<float> y_, top_, total_, scratch_;
};

}  // namespace wh
#endif
