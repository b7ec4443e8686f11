// Numbers as Python writes them, so that reasons have the same words.

// format(value, ".Nf"): a tie, which only some binary numbers are, goes to the even digit.
export function fixed(value, digits) {
  const scale = 10 ** digits, whole = Math.floor(value * scale), ties = value * 2 ** (digits + 1) % 2 === 1;
  return ties ? ((whole + whole % 2) / scale).toFixed(digits) : value.toFixed(digits);
}

// format(value, ".0%")
export const percent = value => `${fixed(value * 100, 0)}%`;

// format(value, "g")
export const general = value => String(Number(value.toPrecision(6)));

export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
export const known = value => value !== null && value !== undefined;
