// Numbers different keys 0, 1, 2, ... in the order in which they come. A hash table with open
// addressing: a look-up takes a few instructions, and nothing is allocated once it has grown.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace fastopt {

inline uint64_t word_of(uint64_t key) { return key; }
inline uint64_t word_of(const std::pair<int, double>& key) {
  uint64_t word;
  std::memcpy(&word, &key.second, sizeof word);
  return word + static_cast<uint64_t>(key.first) * 0xbf58476d1ce4e5b9;
}

template <class Key>
class Numbering {
 public:
  const std::vector<Key>& keys() const { return keys_; }

  bool contains(const Key& key) const { return slots_[slot_of(key)] >= 0; }

  int number(const Key& key) {
    int32_t* slot = &slots_[slot_of(key)];
    if (*slot >= 0) return *slot;
    keys_.push_back(key);
    *slot = static_cast<int32_t>(keys_.size()) - 1;
    if (keys_.size() * 4 > slots_.size()) grow();
    return static_cast<int>(keys_.size()) - 1;
  }

  void clear() {
    keys_.clear();
    std::fill(slots_.begin(), slots_.end(), kFree);
  }

 private:
  static constexpr int32_t kFree = -1;

  // That of the key, or the free one where it would be.
  size_t slot_of(const Key& key) const {
    size_t slot = word_of(key) * 0x9e3779b97f4a7c15 >> shift_;
    while (slots_[slot] >= 0 && keys_[slots_[slot]] != key) slot = (slot + 1) & (slots_.size() - 1);
    return slot;
  }

  void grow() {
    slots_.assign(slots_.size() * 2, kFree);
    --shift_;
    for (size_t i = 0; i < keys_.size(); ++i)
      slots_[slot_of(keys_[i])] = static_cast<int32_t>(i);
  }

  std::vector<Key> keys_;
  std::vector<int32_t> slots_ = std::vector<int32_t>(16, kFree);  // at most a quarter of them taken
  int shift_ = 64 - 4;
};

}  // namespace fastopt
