// One button opens and closes the source of everything that a page documents; the choice holds for other pages too.
document.addEventListener('DOMContentLoaded', () => {
  const folds = document.querySelectorAll('.tag_source details'), head = document.querySelector('.at-head');
  if (!folds.length || !head) return;
  const button = Object.assign(document.createElement('button'), {className: 'source-switch', type: 'button'});
  const show = on => {
    folds.forEach(o => { o.open = on; });
    button.textContent = on ? 'Hide all source' : 'Show all source';
  };
  let on = localStorage.getItem('source') === 'shown';
  button.addEventListener('click', () => { show(on = !on); localStorage.setItem('source', on ? 'shown' : 'folded'); });
  show(on);
  head.append(button);
});

// What is wider than the screen is scrolled by keys, too.
const reach = () => document.querySelectorAll('pre, .cell_output, .table-wrapper').forEach(o => {
  if (o.scrollWidth > o.clientWidth) o.tabIndex = 0;
  else o.removeAttribute('tabindex');
});
addEventListener('load', reach);
addEventListener('resize', reach);
