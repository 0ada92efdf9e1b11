// What a `wh_team` of the C interface is.
#ifndef WRITEHEAD_TEAM_H
#define WRITEHEAD_TEAM_H

#include "buffer.h"
#include "lookup.h"
#include "threads.h"
#include "writehead.h"

struct wh_team {
    explicit wh_team(int threads) : team(threads) {}

    wh::Team team;
    wh::Buffer<char> scratch;
    wh::Lookup lookup;
};

#endif
