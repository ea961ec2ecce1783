#pragma once
enum { PR_SET_PDEATHSIG = 1 };
int prctl(int, ...);
