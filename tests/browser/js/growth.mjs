// How the time of reading a hostile text grows with its length, as tests/support/growth.py measures it.

const FLOOR = 20_000; // microseconds of the processor; below it, what a call costs at all counts for too much

/** How many times as long it takes to read twice the text that `make` makes: 2 is linear, 4 quadratic; 0: `limit` characters take less
 * than FLOOR. */
export function growth(read, make, limit) {
  for (let size = 1000; ; size = Math.min(4 * size, limit)) {
    if (spent(read, make(size), 1) >= FLOOR) return spent(read, make(size), 3) / spent(read, make(size / 2), 3);
    if (size >= limit) return 0;
  }
}

function spent(read, text, times) {
  const found = Array.from({ length: times }, () => {
    const begun = process.cpuUsage().user;
    read(text);
    return process.cpuUsage().user - begun;
  });
  return Math.min(...found);
}
