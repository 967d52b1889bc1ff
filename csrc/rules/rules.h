// The table of rules.
#pragma once

#include <tuple>

#include "adagrad.h"
#include "adam.h"
#include "assign.h"
#include "lion.h"
#include "rmsprop.h"
#include "sgd.h"

namespace fastopt {

using Rules = std::tuple<SGD<false>, SGD<true>, Lion, Adagrad, RMSprop<false, false>,
                         RMSprop<false, true>, RMSprop<true, false>, RMSprop<true, true>,
                         Adam<false>, Adam<true>, Assign>;
inline constexpr int kRules = std::tuple_size_v<Rules>;

}  // namespace fastopt
