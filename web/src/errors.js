// What can go wrong, as one line for people.  `kind` tells a page what to offer:
// "unsupported": this browser or device cannot run the bundle; "broken": the bundle's files are not right;
// "network": the server does not answer; "lost": the GPU is gone; "usage": an argument is wrong.

export class MbqError extends Error {
  constructor(kind, message) {
    super(message);
    this.name = "MbqError";
    this.kind = kind;
  }
}
