// Included ahead of every mlx-c source on Linux.
#pragma once
#include "half.h"
#if __has_include(<format>)
#include <format>
#else
// gcc before 13 has no <format>; mlx-c uses it for error messages with bare `{}` only.
#include <sstream>
#include <string>
#include <string_view>
namespace std {
template <typename... Args>
string format(string_view text, const Args&... args) {
  ostringstream out;
  auto next = [&](const auto& arg) {
    auto at = text.find("{}");
    if (at == string_view::npos) return;
    out << text.substr(0, at) << arg;
    text.remove_prefix(at + 2);
  };
  (next(args), ...);
  out << text;
  return out.str();
}
} // namespace std
#endif
